// sampled_convolution_: dy_i (+)= conv(x, dW_i) for k sampled weight tangents, as an implicit matrix product: row r is
// a patch of x, one for each image and place of the result, column c an input channel and a place of the kernel.
// Patches are gathered from x stage by stage and tangents are drawn tile by tile (sampled_tile.cuh); neither reaches
// memory. What multiplies them, and float32's three parts, are those of linear.cuh.
//
// Floor for a tangent: that of linear.cuh with rows * columns gathered elements for every kColumns outputs, about 10
// instructions each: three additions and comparisons and a load. A warp gathers the same columns of 32 patches that
// follow one another, whose elements mostly lie side by side; the loads of a stage are under way while the stage before
// is multiplied.
#pragma once

#include "linear.cuh"

namespace frog {

/// Sizes of the three axes: depth, height, width; convolutions of fewer axes have sizes of 1 in front.
struct Axes {
  int at[3];
  __host__ __device__ int64_t product() const { return int64_t{at[0]} * at[1] * at[2]; }
};

template <class T>
struct SampledConvolution {
  using C = typename Compute<T>::type;
  const T* x;  // [batch, channels, image]; fewer than 2^31 elements for one of the batch
  int64_t batch;
  int channels;
  Axes image, kernel, result, stride, padding, dilation;
  int64_t out, k;
  const int64_t* state;  // [seed, step] on the device; coordinates of a standard basis
  int64_t first, offset;
  int64_t split_columns;  // columns of a block, a multiple of kChunk
  C* partials;            // [splits, k, batch, out, result], or null where one block has all columns
  T* dy;                  // [k, batch, out, result]
  bool add;               // to what is there

  __host__ __device__ int64_t rows() const { return batch * result.product(); }
  __host__ __device__ int64_t columns() const { return channels * kernel.product(); }
};

/// A row's image, as the index of its first element, and where its patch starts in it; that may be in the padding.
template <class T>
struct Patch {
  int64_t image;
  int start[3];
  bool live;

  __device__ __forceinline__ void locate(const SampledConvolution<T>& p, int64_t row) {
    live = row < p.rows();
    const int64_t places = p.result.product();
    const int64_t b = live ? row / places : 0;
    int place = live ? static_cast<int>(row - b * places) : 0;
    image = b * p.channels * p.image.product();
#pragma unroll
    for (int a = 2; a >= 0; --a) {
      start[a] = place % p.result.at[a] * p.stride.at[a] - p.padding.at[a];
      place /= p.result.at[a];
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
  /// The element of x under this column, 0 in the padding.
  template <class T>
  __device__ __forceinline__ T read(const SampledConvolution<T>& p, const Patch<T>& patch) const {
    const int z = patch.start[0] + at[0] * p.dilation.at[0], y = patch.start[1] + at[1] * p.dilation.at[1];
    const int x = patch.start[2] + at[2] * p.dilation.at[2];
    const bool inside = patch.live && static_cast<unsigned>(z) < static_cast<unsigned>(p.image.at[0]) &&
                        static_cast<unsigned>(y) < static_cast<unsigned>(p.image.at[1]) &&
                        static_cast<unsigned>(x) < static_cast<unsigned>(p.image.at[2]);
    if (!inside) return T{};
    return p.x[patch.image + ((channel * p.image.at[0] + z) * p.image.at[1] + y) * p.image.at[2] + x];
  }
};

/// Gathers stage after stage of patches: load() begins with one, store() puts it in place. A thread has pieces of 16
/// bytes of E; a warp the same piece of 32 rows.
template <class T, class Tile>
struct PatchCopier {
  using E = typename RowParts<T>::E;
  static constexpr int kParts = RowParts<T>::kParts, kPiece = kPack<E>, kPieces = kStage / kPiece;  // of a row
  static constexpr int kWarps = Tile::kThreads / kWarp;
  static constexpr int kEach = Tile::kRows / kWarp * kPieces / kWarps;  // pieces of a thread
  static_assert(Tile::kRows % kWarp == 0 && Tile::kRows / kWarp * kPieces % kWarps == 0);

  const SampledConvolution<T>& p;
  Patch<T> patches[kEach];
  T held[kEach][kPiece];
  int column, end;  // where the next stage starts; where the block's columns end

  __device__ static __forceinline__ int row_of(int j) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    return (warp + j * kWarps) / kPieces * kWarp + lane;
  }
  __device__ static __forceinline__ int piece_of(int j) {
    return (static_cast<int>(threadIdx.x) / kWarp + j * kWarps) % kPieces;
  }

  __device__ __forceinline__ PatchCopier(const SampledConvolution<T>& p_, int64_t row, int64_t begin, int64_t end_)
      : p(p_), column(static_cast<int>(begin)), end(static_cast<int>(end_)) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) patches[j].locate(p, row + row_of(j));
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

// grid (tiles of rows x tiles of outputs, k, splits)
template <class T, int64_t kDistribution, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    sampled_convolution_kernel(const __grid_constant__ SampledConvolution<T> p) {
  using Kernel = SampledKernel<T, kDistribution, Tile>;
  using E = typename Kernel::E;
  using C = typename Compute<T>::type;
  FROG_SHARED(E, shared);                                 // [2, parts, kRows, kStage], then
  E* const tangents = shared + 2 * Kernel::kRowElements;  // [2, parts, kColumns, kChunk]
  static_assert(Tile::kStages == 2);
  const int64_t row_tiles = ceil_div(p.rows(), Tile::kRows), columns = p.columns();
  const int64_t row = blockIdx.x % row_tiles * Tile::kRows, column = blockIdx.x / row_tiles * Tile::kColumns;
  const int64_t i = blockIdx.y, begin = blockIdx.z * p.split_columns;
  const int64_t end = begin + p.split_columns < columns ? begin + p.split_columns : columns;
  const int chunks = static_cast<int>(ceil_div(end - begin, kChunk)), stages = 2 * chunks;

  TangentRows which;
  which.stream = read_stream(p.state);
  which.tangent = p.first + i;
  which.start = static_cast<uint64_t>(p.offset + column * columns + begin);
  which.in = static_cast<uint64_t>(columns);
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
  PatchCopier<T, Tile> patches(p, row, begin, end);

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
    if (column + c >= p.out) break;
    const C sum = result[place<C, kColumns>(r, c)];
    const int64_t at = ((i * p.batch + image) * p.out + column + c) * places + at_place;
    if (p.partials != nullptr) {
      p.partials[blockIdx.z * p.k * p.out * p.rows() + at] = sum;
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
template <class T>
__global__ void __launch_bounds__(kFinishThreads) basis_convolution_kernel(const SampledConvolution<T> p) {
  using C = typename Compute<T>::type;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x, i = blockIdx.y;
  if (row >= p.rows()) return;
  const int64_t coordinate = p.state[p.first + i], columns = p.columns(), at = coordinate - p.offset;
  const bool hit = at >= 0 && at < p.out * columns;
  Patch<T> patch;
  patch.locate(p, row);
  PatchColumn under;
  under.locate(p, hit ? static_cast<int>(at % columns) : 0);
  const C value = hit ? widen(under.read(p, patch)) : C(0);
  const int64_t places = p.result.product(), image = row / places;
  for (int64_t o = 0; o < p.out; ++o) {
    T* const to = p.dy + ((i * p.batch + image) * p.out + o) * places + row % places;
    const C sum = coordinate < 0 ? static_cast<C>(NAN) : hit && o == at / columns ? value : C(0);
    *to = narrow<T>(p.add ? widen(*to) + sum : sum);
  }
}

/// Columns of a block of the convolution, see split_columns of linear.cuh.
template <class T>
int64_t convolution_split_columns(const SampledConvolution<T>& p, int64_t distribution) {
  if (distribution == kStandardBasis || p.rows() == 0 || p.columns() == 0) return std::max<int64_t>(1, p.columns());
  return split_columns<T, ConvolutionTiles<T>>(p.rows(), p.columns(), p.out, p.k, distribution);
}

/// k at most 65535, the largest grid. An empty sum, of no columns, is for the caller.
template <class T>
void launch_sampled_convolution(const SampledConvolution<T>& p, int64_t distribution, cudaStream_t stream) {
  const int64_t rows = p.rows(), columns = p.columns();
  if (rows == 0 || columns == 0 || p.out == 0) return;
  if (distribution == kStandardBasis) {
    launch(basis_convolution_kernel<T>, dim3(ceil_div(rows, kFinishThreads), p.k), dim3(kFinishThreads), 0, stream, p);
    return;
  }
  const int64_t splits = ceil_div(columns, p.split_columns);
  const auto go = [&](auto tile, auto kernel) {
    using Tile = decltype(tile);
    constexpr int64_t kDistribution = decltype(kernel)::value;
    const int64_t tiles = ceil_div(rows, Tile::kRows) * ceil_div(p.out, Tile::kColumns);
    launch(sampled_convolution_kernel<T, kDistribution, Tile>, dim3(tiles, p.k, splits), dim3(Tile::kThreads),
           SampledKernel<T, kDistribution, Tile>::kShared, stream, p);
  };
  using Normal = std::integral_constant<int64_t, kNormal>;
  using Rademacher = std::integral_constant<int64_t, kRademacher>;
  typename ConvolutionTiles<T>::Few few;
  typename ConvolutionTiles<T>::Many many;
  const bool is_few = rows <= kFewRows;
  if (distribution == kNormal) {
    is_few ? go(few, Normal{}) : go(many, Normal{});
  } else {
    is_few ? go(few, Rademacher{}) : go(many, Rademacher{});
  }
  if (p.partials == nullptr) return;
  const int64_t numel = p.k * p.out * rows;
  launch(add_partials_kernel<T>, dim3(ceil_div(numel, kFinishThreads)), dim3(kFinishThreads), 0, stream, p.dy,
         p.partials, splits, numel, p.add);
}

}  // namespace frog
