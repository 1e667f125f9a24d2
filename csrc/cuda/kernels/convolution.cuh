// sampled_convolution_: dy_i (+)= conv(x, dW_i) for k sampled weight tangents, as an implicit matrix product: row r is
// a patch of x, one for each image and place of the result, column c an input channel and a place of the kernel.
// Patches are gathered from x stage by stage and tangents are drawn tile by tile (sampled_tile.cuh); neither reaches
// memory. What multiplies them, and float32's three parts, are those of linear.cuh.
//
// Floor for a tangent: that of linear.cuh with rows * columns gathered elements for every kColumns outputs, about 10
// instructions each: three additions and comparisons and a load. A warp gathers the same columns of 32 patches that
// follow one another, whose elements mostly lie side by side; the loads of a stage are under way while the stage before
// is multiplied. A tile of outputs lies within one group, so groups of few outputs leave most of it idle.
//
// Transposed, a row is a place of the result too, and what it finds through a place of the kernel is the place of x
// whose window covers it there, if there is one: with strides, most places of the kernel find none, and are multiplied
// as zeros. With a quotient for each axis, gathering takes half as much again. Weights of one output are runs of a
// kernel's size; ScatteredTile says what drawing them takes.
#pragma once

#include "linear.cuh"

namespace frog {

/// Sizes of the three axes: depth, height, width; convolutions of fewer axes have sizes of 1 in front.
struct Axes {
  int at[3];
  __host__ __device__ int64_t product() const { return int64_t{at[0]} * at[1] * at[2]; }
};

/// Division of numbers below 2^31 by a number that is known at launch: a product whose upper bits are the quotient.
struct Divisor {
  uint32_t factor = 0;
  int shift = 0;

  Divisor() = default;
  explicit Divisor(int by) {  // with 2^(n - 1) < by <= 2^n: factor * by is 2^(31 + n) and at most 2^n
    shift = 31;
    while (int64_t{1} << (shift - 31) < by) ++shift;
    factor = static_cast<uint32_t>((uint64_t{1} << shift) / static_cast<uint64_t>(by) + 1);
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t of) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(of) * factor >> shift);
  }
};

template <class T>
struct SampledConvolution {
  using C = typename Compute<T>::type;
  const T* x;  // [batch, groups, channels, image]; fewer than 2^31 elements for one of the batch
  int64_t batch, groups;
  int channels;  // of a group
  Axes image, kernel, result, stride, padding, dilation;
  bool transposed;
  Divisor by_stride[3];  // launch_sampled_convolution fills them in
  int64_t out, k;        // out: of a group
  const int64_t* state;  // [seed, step] on the device; coordinates of a standard basis
  int64_t first, offset;
  int64_t split_columns;  // columns of a block, a multiple of kChunk
  C* partials;            // [splits, k, batch, groups, out, result], or null where one block has all columns
  T* dy;                  // [k, batch, groups, out, result]
  bool add;               // to what is there

  __host__ __device__ int64_t rows() const { return batch * result.product(); }
  __host__ __device__ int64_t columns() const { return channels * kernel.product(); }
  __host__ __device__ int64_t outputs() const { return groups * out; }
};

/// A row's group of an image, as the index of its first element, and where its patch starts in it; that may be in the
/// padding. Transposed: where the row lies in the padded result.
template <class T, bool kTransposed>
struct Patch {
  int64_t image;
  int start[3];
  bool live;

  __device__ __forceinline__ void locate(const SampledConvolution<T>& p, int64_t row, int64_t group) {
    live = row < p.rows();
    const int64_t places = p.result.product();
    const int64_t b = live ? row / places : 0;
    int place = live ? static_cast<int>(row - b * places) : 0;
    image = (b * p.groups + group) * p.channels * p.image.product();
#pragma unroll
    for (int a = 2; a >= 0; --a) {
      const int at = place % p.result.at[a];
      start[a] = kTransposed ? at + p.padding.at[a] : at * p.stride.at[a] - p.padding.at[a];
      place /= p.result.at[a];
    }
  }
  /// Whether the row finds an element through this place of the kernel, on one axis; and where.
  __device__ __forceinline__ bool finds(const SampledConvolution<T>& p, int axis, int tap, int& at) const {
    if constexpr (kTransposed) {
      // Where the window would have to start; if that is negative, it is a number beyond the start of every window.
      const uint32_t window = static_cast<uint32_t>(start[axis] - tap * p.dilation.at[axis]);
      const uint32_t number = p.by_stride[axis].quotient(window);
      at = static_cast<int>(number);
      return number * static_cast<uint32_t>(p.stride.at[axis]) == window &&
             number < static_cast<uint32_t>(p.image.at[axis]);
    } else {
      at = start[axis] + tap * p.dilation.at[axis];
      return static_cast<unsigned>(at) < static_cast<unsigned>(p.image.at[axis]);
    }
  }
};

/// A column's channel and place in the kernel, counted up one by one.
struct PatchColumn {
  int column, channel, at[3];

  template <class T>
  __device__ __forceinline__ void locate(const SampledConvolution<T>& p, int column_) {
    column = column_;
    int rest = column;
#pragma unroll
    for (int a = 2; a >= 0; --a) {
      at[a] = rest % p.kernel.at[a];
      rest /= p.kernel.at[a];
    }
    channel = rest;
  }
  template <class T>
  __device__ __forceinline__ void next(const SampledConvolution<T>& p) {
    ++column;
    if (++at[2] < p.kernel.at[2]) return;
    at[2] = 0;
    if (++at[1] < p.kernel.at[1]) return;
    at[1] = 0;
    if (++at[0] < p.kernel.at[0]) return;
    at[0] = 0;
    ++channel;
  }
  /// The element of x under this column, 0 in the padding and between windows.
  template <class T, bool kTransposed>
  __device__ __forceinline__ T read(const SampledConvolution<T>& p, const Patch<T, kTransposed>& patch) const {
    int z, y, x;
    const bool in_z = patch.finds(p, 0, at[0], z), in_y = patch.finds(p, 1, at[1], y);
    const bool in_x = patch.finds(p, 2, at[2], x);
    const bool inside = patch.live && in_z && in_y && in_x;
    if (!inside) return T{};
    return p.x[patch.image + ((channel * p.image.at[0] + z) * p.image.at[1] + y) * p.image.at[2] + x];
  }
};

/// Gathers stage after stage of patches: load() begins with one, store() puts it in place. A thread has pieces of 16
/// bytes of E; a warp the same piece of 32 rows.
template <class T, class Tile, bool kTransposed>
struct PatchCopier {
  using E = typename RowParts<T>::E;
  static constexpr int kParts = RowParts<T>::kParts, kPiece = kPack<E>, kPieces = kStage / kPiece;  // of a row
  static constexpr int kWarps = Tile::kThreads / kWarp;
  static constexpr int kEach = Tile::kRows / kWarp * kPieces / kWarps;  // pieces of a thread
  static_assert(Tile::kRows % kWarp == 0 && Tile::kRows / kWarp * kPieces % kWarps == 0);

  const SampledConvolution<T>& p;
  Patch<T, kTransposed> patches[kEach];
  T held[kEach][kPiece];
  int column, end;  // where the next stage starts; where the block's columns end

  __device__ static __forceinline__ int row_of(int j) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    return (warp + j * kWarps) / kPieces * kWarp + lane;
  }
  __device__ static __forceinline__ int piece_of(int j) {
    return (static_cast<int>(threadIdx.x) / kWarp + j * kWarps) % kPieces;
  }

  __device__ __forceinline__ PatchCopier(const SampledConvolution<T>& p_, int64_t row, int64_t group, int64_t begin,
                                         int64_t end_)
      : p(p_), column(static_cast<int>(begin)), end(static_cast<int>(end_)) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) patches[j].locate(p, row + row_of(j), group);
  }

  __device__ __forceinline__ void load() {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      PatchColumn at;
      at.locate(p, column + piece_of(j) * kPiece);
#pragma unroll
      for (int e = 0; e < kPiece; ++e) {
        held[j][e] = at.column < end ? at.read(p, patches[j]) : T{};
        at.next(p);
      }
    }
    column += kStage;
  }

  __device__ __forceinline__ void store(E* stage) const {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      Pack<E, kPiece> packs[kParts];
#pragma unroll
      for (int e = 0; e < kPiece; ++e) {
        if constexpr (kParts == 1) {
          packs[0].at[e] = held[j][e];
        } else {
          E parts[kParts];
          split_row(held[j][e], parts);
#pragma unroll
          for (int q = 0; q < kParts; ++q) packs[q].at[e] = parts[q];
        }
      }
#pragma unroll
      for (int q = 0; q < kParts; ++q) {
        E* const to = stage + q * Tile::kRows * kStage + place<E, kStage>(row_of(j), piece_of(j) * kPiece);
        *reinterpret_cast<Pack<E, kPiece>*>(to) = packs[q];
      }
    }
  }
};

/// What a block has, by type: half as many rows as linear.cuh's at most, for registers hold patches as well.
template <class T>
struct ConvolutionTiles {
  using Few = Tile<2, 2, 2, 2, 2, 4>;   //  64 x 32
  using Many = Tile<4, 2, 2, 4, 2, 2>;  // 128 x 64
};
template <>
struct ConvolutionTiles<float> : Tiles<float> {};
template <>
struct ConvolutionTiles<double> : Tiles<double> {};
/// Transposed: one shape, which few rows leave half idle, so that there is less to compile.
template <class T>
struct TransposedTiles {
  using Many = typename ConvolutionTiles<T>::Many;
  using Few = Many;
};

// grid (tiles of rows x tiles of outputs of each group, k, splits)
template <class T, int64_t kDistribution, class Tile, bool kTransposed>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    sampled_convolution_kernel(const __grid_constant__ SampledConvolution<T> p) {
  using Kernel = SampledKernel<T, kDistribution, Tile, kTransposed>;
  using E = typename Kernel::E;
  using C = typename Compute<T>::type;
  FROG_SHARED(E, shared);                                 // [2, parts, kRows, kStage], then
  E* const tangents = shared + 2 * Kernel::kRowElements;  // [2, parts, kColumns, kChunk]
  static_assert(Tile::kStages == 2);
  const int64_t row_tiles = ceil_div(p.rows(), Tile::kRows), columns = p.columns();
  const int64_t row = blockIdx.x % row_tiles * Tile::kRows;
  const uint32_t tile = static_cast<uint32_t>(blockIdx.x / row_tiles);
  const uint32_t group_tiles = static_cast<uint32_t>(ceil_div(p.out, Tile::kColumns));
  const int64_t group = tile / group_tiles;
  const int64_t filter = int64_t{tile % group_tiles} * Tile::kColumns,
                output = group * p.out + filter;  // the tile's first
  const int64_t i = blockIdx.y, begin = blockIdx.z * p.split_columns;
  const int64_t end = begin + p.split_columns < columns ? begin + p.split_columns : columns;
  const int chunks = static_cast<int>(ceil_div(end - begin, kChunk)), stages = 2 * chunks;

  typename Kernel::Drawn::Rows which;
  which.stream = read_stream(p.state);
  which.tangent = p.first + i;
  which.live = static_cast<int>(p.out - filter < Tile::kColumns ? p.out - filter : Tile::kColumns);
  which.columns = static_cast<int>(end - begin);
  if constexpr (kTransposed) {
    const int64_t taps = p.kernel.product();
    which.start = static_cast<uint64_t>(p.offset + (group * p.channels * p.out + filter) * taps);
    which.in = static_cast<uint64_t>(taps);
    which.apart = static_cast<uint64_t>(p.out * taps);
    which.begin = static_cast<uint32_t>(begin);
  } else {
    which.start = static_cast<uint64_t>(p.offset + output * columns + begin);
    which.in = static_cast<uint64_t>(columns);
    which.quads = (which.start | which.in) % 4 == 0;
  }
  typename Kernel::Drawn drawn;
  if constexpr (kDistribution == kRademacher && !kTransposed) {
    drawn.words = reinterpret_cast<uint32_t*>(tangents + 2 * Kernel::kTangentElements);
  }

  const int warp = static_cast<int>(threadIdx.x / kWarp), lane = static_cast<int>(threadIdx.x % kWarp);
  const int own_row = warp / Tile::kColumnWarps * Tile::kM * 16, own_column = warp % Tile::kColumnWarps * Tile::kN * 8;
  Sums<T, Tile, Kernel::kRowParts, Kernel::Parts::kParts> sums(own_row, own_column);
  PatchCopier<T, Tile, kTransposed> patches(p, row, group, begin, end);

  patches.load();
  for (int step = 2 * (Kernel::Drawn::kFirst - 1); step < stages; ++step) {
    const int chunk = step >> 1, half = step & 1;
    E* const stage = shared + half * Kernel::kRowElements;  // last read two steps ago
    if (step >= 0) patches.store(stage);
    __syncthreads();  // this stage and its tile are there; what the step before read may be overwritten
    if (step >= 0 && step + 1 < stages) patches.load();
    E* const next = tangents + ((chunk + 1) & 1) * Kernel::kTangentElements;
    if (chunk + 1 < chunks) drawn.prepare(which, chunk + 1, half, next);
    if (step >= 0) sums.add(stage, tangents + (chunk & 1) * Kernel::kTangentElements, half);
  }
  __syncthreads();

  // Through shared memory, so that places of the result that lie side by side are written together.
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
  static_assert(Tile::kThreads % Tile::kRows == 0);
  const int r = static_cast<int>(threadIdx.x) % Tile::kRows;
  if (row + r >= p.rows()) return;
  const int64_t places = p.result.product(), image = (row + r) / places, at_place = (row + r) % places;
  for (int c = static_cast<int>(threadIdx.x) / Tile::kRows; c < kColumns; c += Tile::kThreads / Tile::kRows) {
    if (c >= which.live) break;
    const C sum = result[place<C, kColumns>(r, c)];
    const int64_t at = ((i * p.batch + image) * p.outputs() + output + c) * places + at_place;
    if (p.partials != nullptr) {
      p.partials[blockIdx.z * p.k * p.outputs() * p.rows() + at] = sum;
    } else {
      p.dy[at] = narrow<T>(p.add ? widen(p.dy[at]) + sum : sum);
    }
  }
}

// dy [numel] (+)= the sum of partials [splits, numel], in order
template <class T>
__global__ void __launch_bounds__(kFinishThreads)
    add_partials_kernel(T* __restrict__ dy, const typename Compute<T>::type* __restrict__ partials, int64_t splits,
                        int64_t numel, bool add) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (at >= numel) return;
  typename Compute<T>::type sum = 0;
  for (int64_t s = 0; s < splits; ++s) sum += partials[s * numel + at];
  dy[at] = narrow<T>(add ? widen(dy[at]) + sum : sum);
}

// A standard basis: tangent i is 1 at one element of the weight, so its result is one column of the patches in one
// output channel, 0 elsewhere. A negative coordinate makes its tangent NaN. grid (rows, k)
template <class T, bool kTransposed>
__global__ void __launch_bounds__(kFinishThreads) basis_convolution_kernel(const SampledConvolution<T> p) {
  using C = typename Compute<T>::type;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x, i = blockIdx.y;
  if (row >= p.rows()) return;
  const int64_t coordinate = p.state[p.first + i], columns = p.columns(), at = coordinate - p.offset;
  const bool hit = at >= 0 && at < p.outputs() * columns;
  int64_t group = 0, output = 0, column = 0;
  if (hit && kTransposed) {  // [groups, channels, out, taps]
    const int64_t taps = p.kernel.product(), run = at / taps, channel = run / p.out;
    group = channel / p.channels, output = group * p.out + run % p.out;
    column = channel % p.channels * taps + at % taps;
  } else if (hit) {  // [groups, out, columns]
    output = at / columns, group = output / p.out, column = at % columns;
  }
  Patch<T, kTransposed> patch;
  patch.locate(p, row, group);
  PatchColumn under;
  under.locate(p, static_cast<int>(column));
  const C value = hit ? widen(under.read(p, patch)) : C(0);
  const int64_t places = p.result.product(), image = row / places;
  T* to = p.dy + (i * p.batch + image) * p.outputs() * places + row % places;
  for (int64_t o = 0; o < p.outputs(); ++o, to += places) {
    const C sum = coordinate < 0 ? static_cast<C>(NAN) : hit && o == output ? value : C(0);
    *to = narrow<T>(p.add ? widen(*to) + sum : sum);
  }
}

/// Columns of a block of the convolution, see split_columns of linear.cuh.
template <class T>
int64_t convolution_split_columns(const SampledConvolution<T>& p, int64_t distribution) {
  if (distribution == kStandardBasis || p.rows() == 0 || p.columns() == 0) return std::max<int64_t>(1, p.columns());
  const int64_t rows = p.rows(), columns = p.columns(), tangents = p.k * p.groups;  // each has blocks of its own
  if (p.transposed) return split_columns<T, TransposedTiles<T>>(rows, columns, p.out, tangents);
  return split_columns<T, ConvolutionTiles<T>>(rows, columns, p.out, tangents);
}

/// k at most 65535, the largest grid. An empty sum, of no columns, is for the caller.
template <class T>
void launch_sampled_convolution(const SampledConvolution<T>& given, int64_t distribution, cudaStream_t stream) {
  SampledConvolution<T> p = given;
  for (int a = 0; a < 3; ++a) p.by_stride[a] = Divisor(p.stride.at[a]);
  const int64_t rows = p.rows(), columns = p.columns();
  if (rows == 0 || columns == 0 || p.out == 0) return;
  if (distribution == kStandardBasis) {
    launch(p.transposed ? basis_convolution_kernel<T, true> : basis_convolution_kernel<T, false>,
           dim3(ceil_div(rows, kFinishThreads), p.k), dim3(kFinishThreads), 0, stream, p);
    return;
  }
  const int64_t splits = ceil_div(columns, p.split_columns);
  const auto go = [&](auto tile, auto kernel, auto transposed) {
    using Tile = decltype(tile);
    constexpr int64_t kDistribution = decltype(kernel)::value;
    constexpr bool kTransposed = decltype(transposed)::value;
    const int64_t tiles = ceil_div(rows, Tile::kRows) * p.groups * ceil_div(p.out, Tile::kColumns);
    launch(sampled_convolution_kernel<T, kDistribution, Tile, kTransposed>, dim3(tiles, p.k, splits),
           dim3(Tile::kThreads), SampledKernel<T, kDistribution, Tile, kTransposed>::kShared, stream, p);
  };
  const auto draw = [&](auto kernel) {
    if (p.transposed) return go(typename TransposedTiles<T>::Many{}, kernel, std::true_type{});
    if (rows <= kFewRows) return go(typename ConvolutionTiles<T>::Few{}, kernel, std::false_type{});
    go(typename ConvolutionTiles<T>::Many{}, kernel, std::false_type{});
  };
  if (distribution == kNormal) {
    draw(std::integral_constant<int64_t, kNormal>{});
  } else {
    draw(std::integral_constant<int64_t, kRademacher>{});
  }
  if (p.partials == nullptr) return;
  const int64_t numel = p.k * p.outputs() * rows;
  launch(add_partials_kernel<T>, dim3(ceil_div(numel, kFinishThreads)), dim3(kFinishThreads), 0, stream, p.dy,
         p.partials, splits, numel, p.add);
}

}  // namespace frog
