// linear_jvp's own kernels: products with sampled weight tangents, dy_i = x dW_i^T, whose elements are drawn tile by
// tile (sampled_tile.cuh) and never reach memory.
//
// Floor for a tangent: rows * in * out multiply-adds on tensor cores, 1 for bfloat16 and float16, 3 for float32 with
// Rademacher tangents, 6 with normal ones; and for every tile of rows in * out drawn elements, in compiled code about 8
// instructions for a sign and 40 for a normal element. A block draws once for kRows rows of x, as many as its sums
// leave registers for. x comes from second-level cache in stages of kStage columns by asynchronous copies that run
// ahead. Two blocks of a multiprocessor fill each other's waits.
//
// float32 is exact to its own rounding: x is the sum of three bfloat16 (8 bits each), so is a normal element, and a
// sign is one. Tensor cores cut sums off (mma.cuh), so their sums are kept short: after kStage columns they are added
// to the running sums, which round to nearest.
#pragma once

#include "linear_finish.cuh"
#include "mma.cuh"
#include "sampled_tile.cuh"

namespace frog {

constexpr int kStage = 32;  // columns of x that are copied at a time, half a chunk

/// x as the kernel reads it: kParts matrices of E that add up to it.
template <class T>
struct RowParts {
  using E = T;
  static constexpr int kParts = 1;
};
template <>
struct RowParts<float> {
  using E = bf16;
  static constexpr int kParts = 3;
};

// ---- x in parts

/// An element of x as parts that add up to it; of infinity and NaN the first part alone.
__device__ __forceinline__ void split_row(float value, bf16 (&parts)[RowParts<float>::kParts]) {
  TangentParts<float, kNormal>::split(value, parts);
  const bool finite = (float_bits(value) & 0x7F800000u) != 0x7F800000u;
  if (value != value) parts[0] = {0x7FC0};  // a NaN whose upper bits are all 0 would look like infinity
#pragma unroll
  for (int p = 1; p < RowParts<float>::kParts; ++p) parts[p] = finite ? parts[p] : bf16{0};
}

template <class T>
__global__ void pack_rows_kernel(const T* __restrict__ x, int64_t rows, int64_t in, int64_t ld,
                                 typename RowParts<T>::E* __restrict__ packed) {
  using E = typename RowParts<T>::E;
  constexpr int kParts = RowParts<T>::kParts, kOut = kPack<E>;
  const int64_t pieces = ld / kOut;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= rows * pieces) return;
  const int64_t row = at / pieces, column = at % pieces * kOut;
  Pack<E, kOut> parts[kParts];
#pragma unroll
  for (int j = 0; j < kOut; ++j) {
    const T value = column + j < in ? x[row * in + column + j] : T{};
    if constexpr (kParts == 1) {
      parts[0].at[j] = value;
    } else {
      E split[kParts];
      split_row(value, split);
#pragma unroll
      for (int p = 0; p < kParts; ++p) parts[p].at[j] = split[p];
    }
  }
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    *reinterpret_cast<Pack<E, kOut>*>(packed + (p * rows + row) * ld + column) = parts[p];
  }
}

/// Elements of a row of packed x: whole stages, so that its end needs no care.
inline int64_t packed_columns(int64_t in) { return ceil_div(in, kChunk) * kChunk; }

/// Whether x [rows, in] can be read as it is: one part, every piece of 16 bytes aligned and within a row.
template <class T>
bool reads_unpacked(const T* x, int64_t in) {
  return RowParts<T>::kParts == 1 && aligned16(x) && in % kPack<T> == 0;
}

/// x [rows, in] -> packed [parts, rows, packed_columns(in)], zeros beyond `in`.
template <class T>
void launch_pack_rows(const T* x, int64_t rows, int64_t in, typename RowParts<T>::E* packed, cudaStream_t stream) {
  const int64_t ld = packed_columns(in), threads = rows * (ld / kPack<typename RowParts<T>::E>);
  if (threads == 0) return;
  launch(pack_rows_kernel<T>, dim3(ceil_div(threads, 256)), dim3(256), 0, stream, x, rows, in, ld, packed);
}

// ---- products

/// A block's share: kRows rows of x times kColumns rows of dW_i, in warp tiles of 16 kM by 8 kN.
template <int kRowWarps_, int kColumnWarps_, int kM_, int kN_, int kStages_, int kBlocks_>
struct Tile {
  static constexpr int kRowWarps = kRowWarps_, kColumnWarps = kColumnWarps_, kM = kM_, kN = kN_;
  static constexpr int kStages = kStages_;  // of x in shared memory
  static constexpr int kBlocks = kBlocks_;  // of a multiprocessor, which bounds registers
  static constexpr int kRows = kRowWarps * kM * 16, kColumns = kColumnWarps * kN * 8;
  static constexpr int kThreads = kRowWarps * kColumnWarps * kWarp;
};
// What few rows take, and what more than kFewRows take. All fit the 99 KB of the GPUs with least shared memory.
template <class T>
struct Tiles {
  using Few = Tile<2, 2, 2, 2, 3, 4>;   //  64 x 32
  using Many = Tile<4, 2, 4, 4, 3, 2>;  // 256 x 64
};
template <>
struct Tiles<float> {
  using Few = Tile<2, 2, 2, 2, 2, 3>;   //  64 x 32
  using Many = Tile<4, 2, 2, 4, 2, 1>;  // 128 x 64
};
template <>
struct Tiles<double> {
  using Few = Tile<4, 1, 1, 4, 2, 2>;  // 64 x 32
  using Many = Few;
};
constexpr int64_t kFewRows = 64;

template <class T>
struct SampledProduct {
  const typename RowParts<T>::E* x;  // [parts, rows, ld]
  int64_t ld, width;                 // from row to row; columns from `width` on are not there and count as 0
  int64_t rows, in, out, k;
  const int64_t* state;  // [seed, step] on the device
  int64_t first, offset;
  int64_t split_columns;                // columns of a block, a multiple of kChunk
  typename Compute<T>::type* partials;  // [splits, k, rows, out], or null where one block has all columns
  Finish<T> finish;                     // where it has; without products and partials of its own
  bool packs;                           // 16 bytes of results can be written at once
};

// Sums of one warp, in the places of an m16n8 step's result (mma.cuh). Where a lane finds its elements is worked out
// once: for the first row and column of the warp tile, from which others differ by a constant or in bits that place()
// exchanges.
template <class T, class Tile, int kRowParts, int kTangentParts>
struct Sums {
  using E = typename RowParts<T>::E;
  float at[Tile::kM][Tile::kN][4] = {};
  int own_row, own_tangent;

  __device__ __forceinline__ Sums(int row, int column) {
    const uint32_t lane = threadIdx.x % kWarp;
    own_row = place<E, kStage>(row + lane % 16, lane / 16 * 8);
    own_tangent = place<E, kChunk>(column + lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8);
  }

  /// += rows [parts, kRows, kStage] times tangents [parts, kColumns, kChunk], the half of it that belongs to the stage.
  __device__ __forceinline__ void add(const E* rows, const E* tangents, int half) {
    constexpr int kM = Tile::kM, kN = Tile::kN;
    constexpr bool kShort = kRowParts > 1;  // sums of a stage on their own
    float stage[kM][kN][4] = {};
#pragma unroll
    for (int k = 0; k < kStage; k += 16) {
      uint32_t a[kRowParts][kM][4];
#pragma unroll
      for (int p = 0; p < kRowParts; ++p) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          load_matrices(a[p][m], rows + (p * Tile::kRows + 16 * m) * kStage + (own_row ^ k));
        }
      }
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t b[kTangentParts][2][2];
#pragma unroll
        for (int p = 0; p < kTangentParts; ++p) {
          uint32_t two[4];
          load_matrices(two, tangents + (p * Tile::kColumns + 8 * n) * kChunk + (own_tangent ^ (half * kStage + k)));
          b[p][0][0] = two[0], b[p][0][1] = two[1], b[p][1][0] = two[2], b[p][1][1] = two[3];
        }
        // Products of parts i and j are about 2^(-8 (i + j)) of the largest: smallest first, none beyond the third
#pragma unroll
        for (int order = kRowParts - 1; order >= 0; --order) {
#pragma unroll
          for (int j = kTangentParts - 1; j >= 0; --j) {
            const int i = order - j;
            if (i < 0 || i >= kRowParts) continue;
#pragma unroll
            for (int m = 0; m < kM; ++m) {
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                mma_m16n8k16<E>(kShort ? stage[m][n + h] : at[m][n + h], a[i][m], b[j][h]);
              }
            }
          }
        }
      }
    }
    if constexpr (kShort) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) at[m][n][e] += stage[m][n][e];
        }
      }
    }
  }
};

// float64 takes plain multiply-adds: it is there for exactness.
template <class Tile, int kRowParts, int kTangentParts>
struct Sums<double, Tile, kRowParts, kTangentParts> {
  double at[Tile::kM][Tile::kN][4] = {};
  int row, column;

  __device__ __forceinline__ Sums(int row_, int column_) : row(row_), column(column_) {}

  __device__ __forceinline__ void add(const double* rows, const double* tangents, int half) {
    constexpr int kM = Tile::kM, kN = Tile::kN;
    const int lane = static_cast<int>(threadIdx.x % kWarp), g = lane / 4, t = lane % 4;
#pragma unroll 2
    for (int k = 0; k < kStage; ++k) {
      double a[kM][2], b[kN][2];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        a[m][0] = rows[place<double, kStage>(row + 16 * m + g, k)];
        a[m][1] = rows[place<double, kStage>(row + 16 * m + g + 8, k)];
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        b[n][0] = tangents[place<double, kChunk>(column + 8 * n + 2 * t, half * kStage + k)];
        b[n][1] = tangents[place<double, kChunk>(column + 8 * n + 2 * t + 1, half * kStage + k)];
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) at[m][n][e] += a[m][e / 2] * b[n][e % 2];
        }
      }
    }
  }
};

template <class T, int64_t kDistribution, class Tile, bool kScattered = false>
struct SampledKernel {
  using Parts = TangentParts<T, kDistribution>;
  using E = typename Parts::E;
  static constexpr int kRowParts = RowParts<T>::kParts;
  static constexpr int kRowElements = kRowParts * Tile::kRows * kStage;             // of a stage of x
  static constexpr int kTangentElements = Parts::kParts * Tile::kColumns * kChunk;  // of a tile
  using Normal = NormalTile<Parts, Tile::kColumns, Tile::kThreads>;
  using Sign = SignTile<Parts, Tile::kColumns, Tile::kThreads>;
  using Scattered = ScatteredTile<Parts, kDistribution, Tile::kColumns, Tile::kThreads>;
  using Drawn = std::conditional_t<kScattered, Scattered, std::conditional_t<kDistribution == kNormal, Normal, Sign>>;
  static constexpr size_t kShared = (Tile::kStages * kRowElements + 2 * kTangentElements) * sizeof(E) + Drawn::kShared;
  static_assert(kShared <= 99 * 1024);
  static_assert(kShared >= Tile::kRows * Tile::kColumns * sizeof(typename Compute<T>::type));  // for the sums at last
};

// Copies stage after stage of x, zeros where x has none. A thread copies the same pieces of every stage.
template <class T, class Tile>
struct RowCopier {
  using E = typename RowParts<T>::E;
  static constexpr int kParts = RowParts<T>::kParts;
  static constexpr int kPieces = kStage / kPack<E>;             // of a row
  static constexpr int kApart = Tile::kThreads / kPieces;       // rows from a thread's piece to its next one
  static constexpr int kEach = Tile::kRows / kApart;            // pieces of a part
  static_assert(kApart % 8 == 0 && Tile::kRows % kApart == 0);  // all at the same place within their rows

  const E* from;
  int64_t part, next_row;  // elements to the next part and to the next piece
  int64_t left;            // columns from here to the end of x
  int live, to;            // rows from here on; place in the stage

  __device__ __forceinline__ RowCopier(const SampledProduct<T>& p, int64_t row, int64_t column) {
    const int r = static_cast<int>(threadIdx.x / kPieces), c = static_cast<int>(threadIdx.x % kPieces * kPack<E>);
    from = p.x + (row + r) * p.ld + column + c;
    part = p.rows * p.ld, next_row = kApart * p.ld;
    left = p.width - column - c;
    live = static_cast<int>(p.rows - row < Tile::kRows ? p.rows - row : Tile::kRows) - r;
    to = place<E, kStage>(r, c);
  }

  __device__ __forceinline__ void next(E* stage) {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        copy_async16(stage + (p * Tile::kRows + j * kApart) * kStage + to, from + p * part + j * next_row,
                     left > 0 && j * kApart < live);
      }
    }
    from += kStage, left -= kStage;
  }
};

// grid (tiles of rows x tiles of columns, k, splits)
template <class T, int64_t kDistribution, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) sampled_product_kernel(const SampledProduct<T> p) {
  using Kernel = SampledKernel<T, kDistribution, Tile>;
  using E = typename Kernel::E;
  FROG_SHARED(E, shared);
  E* const tangents = shared + Tile::kStages * Kernel::kRowElements;  // [2, parts, kColumns, kChunk]
  const int64_t row_tiles = ceil_div(p.rows, Tile::kRows);
  const int64_t row = blockIdx.x % row_tiles * Tile::kRows, column = blockIdx.x / row_tiles * Tile::kColumns;
  const int64_t i = blockIdx.y, begin = blockIdx.z * p.split_columns;
  const int64_t end = begin + p.split_columns < p.in ? begin + p.split_columns : p.in;
  const int chunks = static_cast<int>(ceil_div(end - begin, kChunk)), stages = 2 * chunks;

  TangentRows which;
  which.stream = read_stream(p.state);
  which.tangent = p.first + i;
  which.start = static_cast<uint64_t>(p.offset + column * p.in + begin);
  which.in = static_cast<uint64_t>(p.in);
  which.live = static_cast<int>(p.out - column < Tile::kColumns ? p.out - column : Tile::kColumns);
  which.columns = static_cast<int>(end - begin);
  which.quads = (which.start | which.in) % 4 == 0;
  typename Kernel::Drawn drawn;
  if constexpr (kDistribution == kRademacher) {
    drawn.words = reinterpret_cast<uint32_t*>(tangents + 2 * Kernel::kTangentElements);
  }

  const int warp = static_cast<int>(threadIdx.x / kWarp), lane = static_cast<int>(threadIdx.x % kWarp);
  const int own_row = warp / Tile::kColumnWarps * Tile::kM * 16, own_column = warp % Tile::kColumnWarps * Tile::kN * 8;
  Sums<T, Tile, Kernel::kRowParts, Kernel::Parts::kParts> sums(own_row, own_column);
  RowCopier<T, Tile> rows(p, row, begin);

#pragma unroll
  for (int s = 0; s < Tile::kStages - 1; ++s) {
    if (s < stages) rows.next(shared + s * Kernel::kRowElements);
    copy_async_commit();
  }
  int current = 0;  // stage of x in use
  for (int step = 2 * (Kernel::Drawn::kFirst - 1); step < stages; ++step) {
    const int chunk = step >> 1, half = step & 1;
    if (step >= 0) copy_async_wait<Tile::kStages - 2>();
    __syncthreads();  // this stage and its tile are there; what the step before read may be overwritten
    if (step >= 0) {
      const int ahead = step + Tile::kStages - 1, free = current == 0 ? Tile::kStages - 1 : current - 1;
      if (ahead < stages) rows.next(shared + free * Kernel::kRowElements);
      copy_async_commit();
    }
    E* const next = tangents + ((chunk + 1) & 1) * Kernel::kTangentElements;
    if (chunk + 1 < chunks) drawn.prepare(which, chunk + 1, half, next);
    if (step >= 0) {
      sums.add(shared + current * Kernel::kRowElements, tangents + (chunk & 1) * Kernel::kTangentElements, half);
      current = current + 1 == Tile::kStages ? 0 : current + 1;
    }
  }
  copy_async_wait<0>();
  __syncthreads();

  // Through shared memory, so that whole rows of the tile are written.
  using C = typename Compute<T>::type;
  constexpr int kColumns = Tile::kColumns;
  C* const result = reinterpret_cast<C*>(shared);  // [kRows, kColumns]
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = own_row + 16 * m + lane / 4 + e / 2 * 8, c = own_column + 8 * n + lane % 4 * 2 + e % 2;
        result[place<C, kColumns>(r, c)] = which.stream.valid ? sums.at[m][n][e] : static_cast<C>(NAN);
      }
    }
  }
  __syncthreads();
  if (p.partials == nullptr && p.packs) {
    constexpr int kAtOnce = kPack<T>;
    for (int at = static_cast<int>(threadIdx.x) * kAtOnce; at < Tile::kRows * kColumns;
         at += Tile::kThreads * kAtOnce) {
      const int r = at / kColumns, c = at % kColumns;
      if (row + r >= p.rows || column + c >= p.out) continue;
      C sum[kAtOnce];
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) sum[e] = result[place<C, kColumns>(r, c + e)];
      p.finish.store(i, row + r, column + c, sum);
    }
    return;
  }
  for (int at = static_cast<int>(threadIdx.x); at < Tile::kRows * kColumns; at += Tile::kThreads) {
    const int r = at / kColumns, c = at % kColumns;
    if (row + r >= p.rows || column + c >= p.out) continue;
    C sum[1] = {result[place<C, kColumns>(r, c)]};
    if (p.partials != nullptr) {
      p.partials[((blockIdx.z * p.k + i) * p.rows + row + r) * p.out + column + c] = sum[0];
    } else {
      p.finish.store(i, row + r, column + c, sum);
    }
  }
}

/// Columns of a block: all of them where rows, outputs and tangents give enough blocks, else so few that there are
/// about as many as kMultiprocessors hold at once. The same on every device, so that sums are.
template <class T, class Shapes = Tiles<T>>
int64_t split_columns(int64_t rows, int64_t in, int64_t out, int64_t k) {
  constexpr int64_t kMultiprocessors = 128;
  // Work for each block. Of the signs that are drawn at a time, four times as many, a block then throws some away: they
  // are a small part of its work, and an idle multiprocessor costs more.
  constexpr int64_t kUnit = 4 * kChunk;
  using Few = typename Shapes::Few;
  using Many = typename Shapes::Many;
  const bool few = rows <= kFewRows;
  const int64_t blocks = k * (few ? ceil_div(rows, Few::kRows) * ceil_div(out, Few::kColumns)
                                  : ceil_div(rows, Many::kRows) * ceil_div(out, Many::kColumns));
  const int64_t enough = kMultiprocessors * (few ? Few::kBlocks : Many::kBlocks);
  const int64_t splits = std::max<int64_t>(1, std::min(ceil_div(in, kUnit), enough / std::max<int64_t>(1, blocks)));
  return ceil_div(ceil_div(in, splits), kUnit) * kUnit;
}

template <class T, int64_t kDistribution, class Tile>
void launch_sampled_tile(SampledProduct<T> p, cudaStream_t stream) {
  p.packs = p.finish.template packs<kPack<T>>();
  const int64_t tiles = ceil_div(p.rows, Tile::kRows) * ceil_div(p.out, Tile::kColumns);
  launch(sampled_product_kernel<T, kDistribution, Tile>, dim3(tiles, p.k, ceil_div(p.in, p.split_columns)),
         dim3(Tile::kThreads), SampledKernel<T, kDistribution, Tile>::kShared, stream, p);
}

/// distribution: normal or Rademacher. k at most 65535, the largest grid.
template <class T>
void launch_sampled_product(const SampledProduct<T>& p, int64_t distribution, cudaStream_t stream) {
  if (p.rows == 0 || p.in == 0 || p.out == 0) return;
  const bool few = p.rows <= kFewRows;
  if (distribution == kNormal) {
    if (few) return launch_sampled_tile<T, kNormal, typename Tiles<T>::Few>(p, stream);
    return launch_sampled_tile<T, kNormal, typename Tiles<T>::Many>(p, stream);
  }
  if (few) return launch_sampled_tile<T, kRademacher, typename Tiles<T>::Few>(p, stream);
  launch_sampled_tile<T, kRademacher, typename Tiles<T>::Many>(p, stream);
}

}  // namespace frog
