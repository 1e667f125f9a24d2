// Gram matrices G = V^T V of drawn or given tangents, in float64; drawn ones are never in memory.
//
// Tensor cores do the products, and the operands need no exchange between lanes: in a product of an [8, m] by an [m, 8]
// matrix that are both V, lane (g, t) holds the same part of both, tangent g at its t-th slots. So a lane draws (or
// loads) its own operands for each octet, eight tangents, and every pair of octets is a product of registers.
//
//   Rademacher: words of Philox are the operands. Bits set in both words are counted (BMMA), 128 elements a step; with
//     n_ij bits set in both, G_ij = n - 2 (n_ii + n_jj - 2 n_ij): exact. Floor: drawing, k / 128 calls an element.
//   Normal: a call gives 8 steps of float64 products (DMMA). Products of float32 are exact in float64, and no sum of
//     float32 would hold the bound of 1e-10. Floor: drawing, k (1/8 call + 1/2 Box-Muller pair) an element, as long as
//     the device has float64 tensor cores in full number (A100, H100, H200); on others the products take longer.
//   Given: the same products; floor: k n elements read once, 16 bytes a lane and load, the next ones under way.
//
// Sums of the elements' parts are written to memory, at most kGramParts, and added up in order by a second kernel: the
// bits do not depend on the device. Tangents beyond kGramTile make further tiles, each drawn (or read) again.
#pragma once

#include "draw.cuh"
#include "mma.cuh"

namespace frog {

constexpr int kGramThreads = 256;
constexpr int kGramWarps = kGramThreads / kWarp;
constexpr int64_t kGramParts = 512;
/// Elements of a part at least: each warp then visits a few units.
constexpr int64_t kGramPartElements = 1024;
/// Tangents of a tile on the diagonal; below it tiles are kGramSide x kGramSide.
constexpr int64_t kGramTile = 64;
constexpr int64_t kGramSide = 32;
/// Doubles of all partial sums together, from which on there are fewer parts.
constexpr int64_t kGramWorkspace = int64_t{1} << 21;
/// Pairs of octets whose warps' sums are in shared memory at a time.
constexpr int kGramPairs = kGramThreads / 64;

// ---- where operands come from
//
// A source cuts the elements into groups of kGroup, a group into kUnits units. Of a unit a lane loads four words for
// each octet; operand() makes kAtOnce operands of the first of them (or of the first two), advance() moves the others
// up. Elements outside the range are made 0 by what keep() finds once for all octets. Rows of an octet beyond k may
// hold anything: no entry that is asked for depends on them.

using Raw = PhiloxWords;

template <int kBy>
__device__ __forceinline__ void advance_words(Raw& raw) {
#pragma unroll
  for (int w = 0; w + kBy < 4; ++w) raw.w[w] = raw.w[w + kBy];
}

struct SignSource {
  using Operand = uint32_t;
  using Sum = int;
  using Keep = Raw;  // the bits inside, word by word
  static constexpr int kRounds = 4, kAtOnce = 1;
  static constexpr bool kAhead = false;                // load the next unit before this one's products
  static constexpr int64_t kGroup = kRademacherGroup;  // elements of a group of units
  static constexpr int64_t kUnits = 2;                 // of four calls each; their elements interleave

  const int64_t* state;
  int64_t first, begin, end;  // elements [begin, end) of the global vector
  Stream stream;

  __device__ __forceinline__ void start() { stream = read_stream(state); }
  __device__ __forceinline__ Keep keep(int64_t unit, int t) const {
    const int64_t group = unit / kUnits * kGroup;
    if (group >= begin && group + kGroup <= end) return {{~0u, ~0u, ~0u, ~0u}};
    const int call = static_cast<int>(4 * (unit % kUnits)) + t;
    Keep inside;
#pragma unroll
    for (int w = 0; w < 4; ++w) inside.w[w] = run_mask(group + 32 * sign_run(call, w), begin, end);
    return inside;
  }
  __device__ __forceinline__ Raw load(int64_t unit, int64_t tangent, int t) const {
    return draw_words(stream, first + tangent, static_cast<uint64_t>(4 * unit + t));
  }
  __device__ __forceinline__ static void operand(const Raw& raw, const Keep& inside, Operand out[kAtOnce]) {
    out[0] = raw.w[0] & inside.w[0];
  }
  __device__ __forceinline__ static void advance(Raw& raw) { advance_words<1>(raw); }
  __device__ __forceinline__ static void advance_keep(Keep& inside) { advance_words<1>(inside); }
  __device__ __forceinline__ static void multiply(Sum (&d)[2], Operand a, Operand b) { mma_m8n8k128(d, a, b); }
};

struct NormalSource {
  using Operand = double;
  using Sum = double;
  using Keep = uint32_t;  // a bit for each of the eight elements
  static constexpr int kRounds = 4, kAtOnce = 2;
  static constexpr bool kAhead = false;
  static constexpr int64_t kGroup = kNormalGroup;
  static constexpr int64_t kUnits = 2;

  const int64_t* state;
  int64_t first, begin, end;
  Stream stream;

  __device__ __forceinline__ void start() { stream = read_stream(state); }
  __device__ __forceinline__ Keep keep(int64_t unit, int t) const {
    const int64_t group = unit / kUnits * kGroup;
    if (group >= begin && group + kGroup <= end) return 0xFFu;
    const int64_t place = group + normal_place(static_cast<int>(4 * (unit % kUnits)) + t);
    Keep inside = 0;
    for (int e = 0; e < 8; ++e) {
      const int64_t at = place + e % 4 + 32 * (e / 4);
      if (at >= begin && at < end) inside |= 1u << e;
    }
    return inside;
  }
  __device__ __forceinline__ Raw load(int64_t unit, int64_t tangent, int t) const {
    return draw_words(stream, first + tangent, static_cast<uint64_t>(4 * unit + t));
  }
  __device__ __forceinline__ static void operand(const Raw& raw, Keep inside, Operand out[kAtOnce]) {
    float pair[2];
    normal_pair(raw.w[0], pair, pair + 1);
#pragma unroll
    for (int e = 0; e < 2; ++e) out[e] = static_cast<double>((inside >> e) & 1u ? pair[e] : 0.0f);
  }
  __device__ __forceinline__ static void advance(Raw& raw) { advance_words<1>(raw); }
  __device__ __forceinline__ static void advance_keep(Keep& inside) { inside >>= 2; }
  __device__ __forceinline__ static void multiply(Sum (&d)[2], Operand a, Operand b) { mma_m8n8k4(d, a, b); }
};

template <class T>
struct GivenSource {
  using Operand = double;
  using Sum = double;
  struct Keep {};                                                           // load() reads zeros
  static constexpr int kWords = sizeof(T) == 8 ? 2 : 1;                     // of a round
  static constexpr int kRounds = 4 / kWords, kAtOnce = kPack<T> / kRounds;  // operands
  static constexpr bool kAhead = true;
  static constexpr int64_t kGroup = 4 * kPack<T>;
  static constexpr int64_t kUnits = 1;

  const T* data;
  int64_t k, begin, end, stride;  // rows of `end` elements, `stride` apart; begin is 0
  bool aligned;                   // every row starts at a multiple of 16 bytes

  __device__ __forceinline__ void start() const {}
  __device__ __forceinline__ Keep keep(int64_t, int) const { return {}; }
  __device__ __forceinline__ Raw load(int64_t unit, int64_t tangent, int t) const {
    const int64_t at = unit * kGroup + t * kPack<T>;
    Pack<T, kPack<T>> pack;
    if (aligned && tangent < k && at + kPack<T> <= end) {
      pack = *reinterpret_cast<const Pack<T, kPack<T>>*>(data + tangent * stride + at);
    } else {
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) {
        pack.at[j] = tangent < k && at + j < end ? data[tangent * stride + at + j] : narrow<T>(0);
      }
    }
    Raw raw;
    memcpy(&raw, &pack, sizeof(raw));
    return raw;
  }
  __device__ __forceinline__ static void operand(const Raw& raw, Keep, Operand out[kAtOnce]) {
    T values[kAtOnce];
    memcpy(values, &raw, sizeof(values));
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) out[e] = static_cast<double>(widen(values[e]));
  }
  __device__ __forceinline__ static void advance(Raw& raw) { advance_words<kWords>(raw); }
  __device__ __forceinline__ static void advance_keep(Keep&) {}
  __device__ __forceinline__ static void multiply(Sum (&d)[2], Operand a, Operand b) { mma_m8n8k4(d, a, b); }
};

// ---- the first kernel: sums of each part

/// Place of G_ij, j <= i, among the entries of the lower triangle.
__host__ __device__ __forceinline__ int64_t triangle(int64_t i, int64_t j) { return i * (i + 1) / 2 + j; }

// Sums of one part for tangents row .. row + 8 A by column .. column + 8 B, or the lower triangle of the former with
// itself. partials [entries of the lower triangle, parts]. Blocks: parts of a tile, tile after tile.
//
// Fewer than eight tangents would leave rows of an octet idle: with up to four, an octet holds 1, 2 or 4 of them
// 2^fold times over, each time with elements of another unit, and those products are added up at the end.
template <class Source, int A, int B, bool kDiagonal>
__global__ void __launch_bounds__(kGramThreads)
    gram_kernel(Source source, int64_t k, int fold, int64_t first_unit, int64_t units, int64_t parts,
                double* __restrict__ partials) {
  using Sum = typename Source::Sum;
  using Operand = typename Source::Operand;
  static_assert(!kDiagonal || A == B, "a tile on the diagonal is square");
  constexpr int kPairs = kDiagonal ? A * (A + 1) / 2 : A * B;
  constexpr int kColumns = kDiagonal ? 1 : B;  // octets of columns that are not rows
  [[maybe_unused]] constexpr int kUnroll =
      A > 2 ? 1 : Source::kRounds;  // a large tile's rounds, unrolled, would not fit the caches
  FROG_SHARED(double, shared);      // [kGramPairs, warps, 64]
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int g = lane / 4, t = lane % 4;
  const int64_t part = blockIdx.x % parts;
  int64_t tile = blockIdx.x / parts, row = tile * kGramTile, column = row;
  if (!kDiagonal) {  // pairs of sides p > q that no tile on the diagonal holds, in order of p
    int64_t p = 2;
    while (tile >= p / 2 * 2) tile -= p++ / 2 * 2;
    row = p * kGramSide;
    column = tile * kGramSide;
  }
  const int64_t left = (k - row + 7) / 8;
  const int octets = left < A ? static_cast<int>(left) : A;
  source.start();

  Sum sums[kPairs][2] = {};
  const int slices = 1 << fold, width = 8 >> fold;
  const int64_t visits = (units + slices - 1) >> fold;
  const int64_t from = visits * part / parts, to = visits * (part + 1) / parts;
  const int64_t tangent = g & (width - 1), unit = first_unit + (g >> (3 - fold));
  const auto unit_of = [&](int64_t visit) { return unit + (visit << fold); };
  const auto load = [&](int64_t visit, Raw rows[A], Raw columns[kColumns]) {
#pragma unroll
    for (int a = 0; a < A; ++a) {
      if (a < octets) rows[a] = source.load(unit_of(visit), row + 8 * a + tangent, t);
    }
    if (!kDiagonal) {
#pragma unroll
      for (int b = 0; b < kColumns; ++b) columns[b] = source.load(unit_of(visit), column + 8 * b + tangent, t);
    }
  };
  constexpr bool kAhead = Source::kAhead && A < 8;  // eight loads at once keep memory as busy, in fewer registers
  Raw rows[A] = {}, columns[kColumns] = {}, next_rows[A] = {}, next_columns[kColumns] = {};
  if (kAhead && from + warp < to) load(from + warp, next_rows, next_columns);
  for (int64_t visit = from + warp; visit < to; visit += kGramWarps) {
    if (kAhead) {
#pragma unroll
      for (int a = 0; a < A; ++a) rows[a] = next_rows[a];
#pragma unroll
      for (int b = 0; b < kColumns; ++b) columns[b] = next_columns[b];
      if (visit + kGramWarps < to) load(visit + kGramWarps, next_rows, next_columns);
    } else {
      load(visit, rows, columns);
    }
    typename Source::Keep keep = source.keep(unit_of(visit), t);
#pragma unroll kUnroll
    for (int round = 0; round < Source::kRounds; ++round) {
      Operand left_side[A][Source::kAtOnce], right_side[kColumns][Source::kAtOnce];
      if (!kDiagonal) {
#pragma unroll
        for (int b = 0; b < kColumns; ++b) {
          Source::operand(columns[b], keep, right_side[b]);
          Source::advance(columns[b]);
        }
      }
#pragma unroll
      for (int a = 0; a < A; ++a) {
        if (a >= octets) continue;
        Source::operand(rows[a], keep, left_side[a]);
        Source::advance(rows[a]);
#pragma unroll
        for (int step = 0; step < Source::kAtOnce; ++step) {
          if constexpr (kDiagonal) {
#pragma unroll
            for (int b = 0; b <= a; ++b) {
              Source::multiply(sums[a * (a + 1) / 2 + b], left_side[a][step], left_side[b][step]);
            }
          } else {
#pragma unroll
            for (int b = 0; b < B; ++b) Source::multiply(sums[a * B + b], left_side[a][step], right_side[b][step]);
          }
        }
      }
      Source::advance_keep(keep);
    }
  }

  // The warps' sums, in order: four pairs of octets at a time, an entry to a thread.
#pragma unroll
  for (int a = 0; a < A; ++a) {
#pragma unroll
    for (int b = 0; b < (kDiagonal ? a + 1 : B); ++b) {
      const int pair = kDiagonal ? a * (a + 1) / 2 + b : a * B + b;
      double* const own = shared + (pair % kGramPairs * kGramWarps + warp) * 64 + 8 * g + 2 * t;
      own[0] = static_cast<double>(sums[pair][0]);
      own[1] = static_cast<double>(sums[pair][1]);
      if ((pair + 1) % kGramPairs != 0 && pair + 1 != kPairs) continue;
      __syncthreads();
      const int mine = pair / kGramPairs * kGramPairs + thread / 64, entry = thread % 64;
      int octet = 0, other = 0;  // rows and columns of pair `mine`
      if (kDiagonal) {
        while (triangle(octet + 1, 0) <= mine) ++octet;
        other = mine - static_cast<int>(triangle(octet, 0));
      } else {
        octet = mine / B;
        other = mine % B;
      }
      const int64_t i = row + 8 * octet + entry / 8, j = column + 8 * other + entry % 8;
      if (mine < kPairs && i < k && j <= i && entry / 8 < width && entry % 8 < width) {
        double total = 0;
        for (int w = 0; w < kGramWarps; ++w) {
          for (int slice = 0; slice < slices; ++slice) {
            total += shared[(thread / 64 * kGramWarps + w) * 64 + entry + 9 * width * slice];
          }
        }
        partials[triangle(i, j) * parts + part] = total;
      }
      __syncthreads();
    }
  }
}

// ---- the second kernel: sums over the parts

enum class GramKind { kGiven, kNormal, kSigns };

// A warp to each entry: lanes add up every 32nd part, then one another. n: the number of elements.
template <GramKind kKind>
__global__ void __launch_bounds__(kGramThreads)
    finish_gram_kernel(const double* __restrict__ partials, const int64_t* __restrict__ state, int64_t k, int64_t parts,
                       int64_t n, double* __restrict__ gram) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const auto total = [&](int64_t i, int64_t j) {
    double sum = 0;
    for (int64_t p = lane; p < parts; p += kWarp) sum += partials[triangle(i, j) * parts + p];
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
    return sum;
  };
  for (int64_t entry = (int64_t{blockIdx.x} * kGramThreads + threadIdx.x) / kWarp; entry < k * k;
       entry += int64_t{gridDim.x} * kGramWarps) {
    const int64_t i = entry / k, j = entry % k;
    if (j > i) continue;
    double value = total(i, j);
    if (kKind == GramKind::kSigns) {
      value = static_cast<double>(n) - 2 * (total(i, i) + total(j, j) - 2 * value);
    }
    if (kKind != GramKind::kGiven) {
      if (!read_stream(state).valid) value = static_cast<double>(NAN);
    }
    if (lane == 0) gram[i * k + j] = gram[j * k + i] = value;
  }
}

// gram [k, k] of a standard basis whose coordinates lie in `state` from `first` on; a negative coordinate gives NaN.
__global__ void __launch_bounds__(kGramThreads)
    basis_gram_kernel(const int64_t* __restrict__ coordinates, int64_t first, int64_t k, int64_t numel, int64_t offset,
                      double* __restrict__ gram) {
  for (int64_t e = int64_t{blockIdx.x} * kGramThreads + threadIdx.x; e < k * k;
       e += int64_t{gridDim.x} * kGramThreads) {
    const int64_t i = coordinates[first + e / k], j = coordinates[first + e % k];
    const bool inside = i >= offset && i < offset + numel;
    gram[e] = i < 0 || j < 0 ? static_cast<double>(NAN) : i == j && inside ? 1.0 : 0.0;
  }
}

// ---- launches

/// Parts that n elements of k tangents are summed in. A warp counts bits in 32-bit integers: at most 2^31 elements
/// each.
inline int64_t gram_parts(int64_t k, int64_t n) {
  const int64_t entries = triangle(k, 0);
  int64_t parts = ceil_div(n, kGramPartElements);
  if (parts > kGramParts) parts = kGramParts;
  if (parts * entries > kGramWorkspace) parts = kGramWorkspace / entries;
  const int64_t least = ceil_div(n, int64_t{1} << 33);
  if (parts < least) parts = least;
  return parts > 1 ? parts : 1;
}

/// Doubles of workspace for launch_gram and launch_drawn_gram.
inline int64_t gram_workspace(int64_t k, int64_t n) { return triangle(k, 0) * gram_parts(k, n); }

template <class Source>
void launch_gram_tiles(const Source& source, int64_t k, double* work, cudaStream_t stream) {
  const int64_t parts = gram_parts(k, source.end - source.begin);
  const int64_t first_unit = source.begin / Source::kGroup * Source::kUnits;
  const int64_t units = ceil_div(source.end, Source::kGroup) * Source::kUnits - first_unit;
  const size_t shared = kGramPairs * kGramWarps * 64 * sizeof(double);
  const dim3 block(kGramThreads);
  const int fold = k == 1 ? 3 : k == 2 ? 2 : k <= 4 ? 1 : 0;
  if (k <= 16) {
    launch(gram_kernel<Source, 2, 2, true>, dim3(parts), block, shared, stream, source, k, fold, first_unit, units,
           parts, work);
    return;
  }
  launch(gram_kernel<Source, 8, 8, true>, dim3(ceil_div(k, kGramTile) * parts), block, shared, stream, source, k, fold,
         first_unit, units, parts, work);
  int64_t tiles = 0;
  for (int64_t p = 2; p * kGramSide < k; ++p) tiles += p / 2 * 2;
  if (tiles > 0) {
    launch(gram_kernel<Source, 4, 4, false>, dim3(tiles * parts), block, shared, stream, source, k, fold, first_unit,
           units, parts, work);
  }
}

template <GramKind kKind>
void launch_finish_gram(const double* work, const int64_t* state, double* gram, int64_t k, int64_t n,
                        cudaStream_t stream) {
  const int64_t blocks = ceil_div(k * k, kGramWarps), filling = blocks_of_device(8);
  launch(finish_gram_kernel<kKind>, dim3(blocks < filling ? blocks : filling), dim3(kGramThreads), 0, stream, work,
         state, k, gram_parts(k, n), n, gram);
}

/// tangents [k, n] with rows `stride` apart -> gram [k, k]
template <class T>
void launch_gram(const T* tangents, double* work, double* gram, int64_t k, int64_t n, int64_t stride,
                 cudaStream_t stream) {
  const bool aligned = aligned16(tangents) && (k == 1 || stride * static_cast<int64_t>(sizeof(T)) % 16 == 0);
  launch_gram_tiles(GivenSource<T>{tangents, k, 0, n, stride, aligned}, k, work, stream);
  launch_finish_gram<GramKind::kGiven>(work, nullptr, gram, k, n, stream);
}

inline void launch_drawn_gram(const int64_t* state, double* work, double* gram, int64_t k, int64_t numel,
                              int64_t offset, int64_t first, int64_t distribution, cudaStream_t stream) {
  if (distribution == kStandardBasis) {
    const int64_t blocks = ceil_div(k * k, kGramThreads), filling = blocks_of_device(8);
    launch(basis_gram_kernel, dim3(blocks < filling ? blocks : filling), dim3(kGramThreads), 0, stream, state, first, k,
           numel, offset, gram);
  } else if (distribution == kRademacher) {
    launch_gram_tiles(SignSource{state, first, offset, offset + numel, {}}, k, work, stream);
    launch_finish_gram<GramKind::kSigns>(work, state, gram, k, numel, stream);
  } else {
    launch_gram_tiles(NormalSource{state, first, offset, offset + numel, {}}, k, work, stream);
    launch_finish_gram<GramKind::kNormal>(work, state, gram, k, numel, stream);
  }
}

}  // namespace frog
