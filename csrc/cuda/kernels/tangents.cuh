// Kernels that write drawn tangents. The draw is that of csrc/distributions.h, so the CPU operators give the same
// elements. combine.cuh writes linear combinations.
//
// A warp works on a window of the global tangent vector: 4 groups of 64 normal elements, a call of Philox to a lane, or
// 1024 or 4096 Rademacher elements whose words the lanes share. Windows lie where the groups do, so a row that is not
// aligned to them is written through shared memory.
//
// A step outside [0, 2^32) and a negative coordinate cannot be refused by a kernel: what they touch is NaN.
#pragma once

#include "draw.cuh"

namespace frog {

/// Few, so that the windows of a small parameter still reach all multiprocessors.
constexpr int kTangentThreads = 64;
constexpr int kTangentWarps = kTangentThreads / kWarp;
/// Blocks of a grid for each multiprocessor, 2048 threads twice over.
constexpr int kTangentBlocks = 64;
/// Elements of a window of normal tangents, and of what is written at once of Rademacher ones.
constexpr int kWindow = 256;

// ---- writing

/// Whether four elements of `data`, whose first is element `offset` of the global vector, can be accessed at once from
/// a multiple of four of the global vector on.
template <class T>
__host__ __device__ inline bool quads_aligned(const T* data, int64_t offset) {
  return (reinterpret_cast<uintptr_t>(data) - static_cast<uint64_t>(offset) * sizeof(T)) % (4 * sizeof(T)) == 0;
}

/// A row of results, written element by element or four at a time. `at` below is where the first element of a window
/// lies in it; it may lie before the row's start.
template <class T>
struct Row {
  using C = typename Compute<T>::type;
  T* data;
  int64_t numel;
  bool add;  // to what is there
  bool aligned;

  __host__ __device__ Row(T* data_, int64_t numel_, int64_t offset, bool add_)
      : data(data_), numel(numel_), add(add_), aligned(quads_aligned(data_, offset)) {}

  __device__ __forceinline__ void four(int64_t at, const C* v) const {
    auto* const to = reinterpret_cast<Pack<T, 4>*>(data + at);
    Pack<T, 4> pack;
    if (add) pack = *to;
#pragma unroll
    for (int j = 0; j < 4; ++j) pack.at[j] = narrow<T>(add ? widen(pack.at[j]) + v[j] : v[j]);
    *to = pack;
  }
  __device__ __forceinline__ void one(int64_t at, C v) const { data[at] = narrow<T>(add ? widen(data[at]) + v : v); }
};

/// Writes the window's elements place .. place + 3 from v[0..3] and second .. second + 3 from v[4..7]. All lanes of the
/// warp call this; together they hold all kWindow elements. `stage` [kWindow] is the warp's own.
template <class Target, class C>
__device__ __forceinline__ void write_window(const Target& row, C* stage, int64_t at, int place, int second,
                                             const C v[8]) {
  if (row.aligned && at >= 0 && at + kWindow <= row.numel) {
    row.four(at + place, v);
    row.four(at + second, v + 4);
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    stage[place + j] = v[j];
    stage[second + j] = v[4 + j];
  }
  __syncwarp();
  for (int e = static_cast<int>(threadIdx.x) % kWarp; e < kWindow; e += kWarp) {
    if (at + e >= 0 && at + e < row.numel) row.one(at + e, stage[e]);
  }
  __syncwarp();
}

/// Writes elements [low, high) of a row, 16 bytes at a time where they are aligned: one(p) is element p, several(p) the
/// pack from p on. Shared by `threads` threads, of which this is number t.
template <class T, class One, class Several>
__device__ __forceinline__ void write_run(T* row, int64_t low, int64_t high, int t, int threads, const One& one,
                                          const Several& several) {
  constexpr int kN = kPack<T>;
  if (low >= high) return;
  const int64_t before = static_cast<int64_t>((16 - reinterpret_cast<uintptr_t>(row + low) % 16) % 16 / sizeof(T));
  const int64_t from = low + before < high ? low + before : high;
  const int64_t packs = (high - from) / kN;
  if (t < from - low) row[low + t] = one(low + t);
  for (int64_t s = t; s < packs; s += threads) {
    *reinterpret_cast<Pack<T, kN>*>(row + from + s * kN) = several(from + s * kN);
  }
  const int64_t rest = from + packs * kN + t;
  if (rest < high) row[rest] = one(rest);
}

template <class T>
__device__ __forceinline__ void fill_run(T* row, int64_t low, int64_t high, int t, int threads, T value) {
  Pack<T, kPack<T>> pack;
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) pack.at[j] = value;
  write_run(row, low, high, t, threads, [&](int64_t) { return value; }, [&](int64_t) { return pack; });
}

template <class T>
__device__ __forceinline__ T not_a_number() {
  return narrow<T>(static_cast<typename Compute<T>::type>(NAN));
}

/// Fills [k, numel] with NaN, all threads of the grid together; blockIdx.y strides over k.
template <class T>
__device__ inline void fill_with_nan(int64_t k, int64_t numel, T* out) {
  const int64_t share = ceil_div(numel, gridDim.x), low = blockIdx.x * share;
  const int64_t high = low + share < numel ? low + share : numel;
  for (int64_t i = blockIdx.y; i < k; i += gridDim.y) {
    fill_run(out + i * numel, low, high, static_cast<int>(threadIdx.x), kTangentThreads, not_a_number<T>());
  }
}

// ---- sample_tangents

/// Windows of `width` elements that [offset, offset + numel) touches.
__host__ __device__ inline int64_t windows_of(int64_t offset, int64_t numel, int64_t width) {
  return ceil_div(offset % width + numel, width);
}

// out [k, numel]. Grid: x over the windows, y over the tangents. Every lane writes two runs of four elements; eight
// lanes together 128 bytes in a row.
template <class T>
__global__ void __launch_bounds__(kTangentThreads)
    sample_normal_kernel(const int64_t* __restrict__ state, int64_t first, int64_t k, int64_t numel, int64_t offset,
                         T* __restrict__ out) {
  using C = typename Compute<T>::type;
  FROG_SHARED(C, stages);  // [warps, kWindow]
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const Stream stream = read_stream(state);
  if (!stream.valid) return fill_with_nan(k, numel, out);
  const int64_t start = offset / kWindow, windows = windows_of(offset, numel, kWindow);
  const int place = 64 * (lane / 8) + normal_place(lane % 8);
  for (int64_t i = blockIdx.y; i < k; i += gridDim.y) {
    const Row<T> row(out + i * numel, numel, offset, false);
    for (int64_t window = int64_t{blockIdx.x} * kTangentWarps + warp; window < windows;
         window += int64_t{gridDim.x} * kTangentWarps) {
      const uint64_t call = static_cast<uint64_t>(start + window) * kWarp + static_cast<uint64_t>(lane);
      float drawn[8];
      normal_elements(draw_words(stream, first + i, call), drawn);
      C values[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] = static_cast<C>(drawn[j]);
      write_window(row, stages + warp * kWindow, (start + window) * kWindow - offset, place, place + 32, values);
    }
  }
}

/// Elements whose words a warp draws at once, a call to a lane: four groups.
constexpr int kSignWindow = 4096;
constexpr int kSignRuns = kSignWindow / 32;

// out [k, numel]. Grid as above. The words go through shared memory in the order of their runs, where a lane finds
// those of any 16 bytes that it writes, wherever the row is aligned.
template <class T>
__global__ void __launch_bounds__(kTangentThreads)
    sample_signs_kernel(const int64_t* __restrict__ state, int64_t first, int64_t k, int64_t numel, int64_t offset,
                        T* __restrict__ out) {
  FROG_SHARED(uint32_t, all_runs);  // [warps, kSignRuns + 1]
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  uint32_t* const runs = all_runs + warp * (kSignRuns + 1);
  const Stream stream = read_stream(state);
  if (!stream.valid) return fill_with_nan(k, numel, out);
  if (lane == 0) runs[kSignRuns] = 0;  // read beside the last run, but no bit of it is used
  const int64_t start = offset / kSignWindow, windows = windows_of(offset, numel, kSignWindow);
  for (int64_t i = blockIdx.y; i < k; i += gridDim.y) {
    T* const row = out + i * numel;
    for (int64_t window = int64_t{blockIdx.x} * kTangentWarps + warp; window < windows;
         window += int64_t{gridDim.x} * kTangentWarps) {
      const uint64_t call = static_cast<uint64_t>(start + window) * kWarp + static_cast<uint64_t>(lane);
      const PhiloxWords words = draw_words(stream, first + i, call);
#pragma unroll
      for (int w = 0; w < 4; ++w) runs[32 * (lane / 8) + sign_run(lane % 8, w)] = words.w[w];
      __syncwarp();
      const int64_t at = (start + window) * kSignWindow - offset;
      const int64_t low = at > 0 ? at : 0, high = at + kSignWindow < numel ? at + kSignWindow : numel;
      write_run(
          row, low, high, lane, kWarp,
          [&](int64_t p) {
            const int e = static_cast<int>(p - at);
            return sign_element<T>((runs[e / 32] >> (e % 32)) & 1u);
          },
          [&](int64_t p) {
            const int e = static_cast<int>(p - at);
            const uint64_t both = (uint64_t{runs[e / 32 + 1]} << 32) | runs[e / 32];
            const uint32_t bits = static_cast<uint32_t>(both >> (e % 32));
            Pack<T, kPack<T>> pack;
#pragma unroll
            for (int j = 0; j < kPack<T>; ++j) pack.at[j] = sign_element<T>((bits >> j) & 1u);
            return pack;
          });
      __syncwarp();
    }
  }
}

// out [k, numel] of a standard basis; coordinates [first + k]. Grid as above; a block owns a part of each row.
template <class T>
__global__ void __launch_bounds__(kTangentThreads)
    sample_basis_kernel(const int64_t* __restrict__ coordinates, int64_t first, int64_t k, int64_t numel,
                        int64_t offset, T* __restrict__ out) {
  const int64_t share = ceil_div(numel, gridDim.x), low = blockIdx.x * share;
  const int64_t high = low + share < numel ? low + share : numel;
  for (int64_t i = blockIdx.y; i < k; i += gridDim.y) {
    const int64_t coordinate = coordinates[first + i], hit = coordinate - offset;
    T* const row = out + i * numel;
    if (coordinate < 0) {
      fill_run(row, low, high, static_cast<int>(threadIdx.x), kTangentThreads, not_a_number<T>());
      continue;
    }
    const T zero = narrow<T>(0), one = narrow<T>(1);
    write_run(
        row, low, high, static_cast<int>(threadIdx.x), kTangentThreads,
        [&](int64_t p) { return p == hit ? one : zero; },
        [&](int64_t p) {
          Pack<T, kPack<T>> pack;
#pragma unroll
          for (int j = 0; j < kPack<T>; ++j) pack.at[j] = p + j == hit ? one : zero;
          return pack;
        });
  }
}

inline dim3 sample_grid(int64_t k, int64_t windows_per_row, int64_t windows_per_block) {
  const int64_t rows = k < 65535 ? k : 65535;
  const int64_t blocks = ceil_div(windows_per_row, windows_per_block);
  const int64_t filling = ceil_div(blocks_of_device(kTangentBlocks), rows);
  return dim3(static_cast<unsigned>(blocks < filling ? blocks : filling), static_cast<unsigned>(rows));
}

template <class T>
void launch_sample(const int64_t* state, T* out, int64_t k, int64_t numel, int64_t offset, int64_t first,
                   int64_t distribution, cudaStream_t stream) {
  using C = typename Compute<T>::type;
  if (numel == 0) return;
  const dim3 block(kTangentThreads);
  if (distribution == kStandardBasis) {
    const dim3 grid = sample_grid(k, ceil_div(numel, 4096), 1);
    launch(sample_basis_kernel<T>, grid, block, 0, stream, state, first, k, numel, offset, out);
  } else if (distribution == kRademacher) {
    const dim3 grid = sample_grid(k, windows_of(offset, numel, kSignWindow), kTangentWarps);
    launch(sample_signs_kernel<T>, grid, block, kTangentWarps * (kSignRuns + 1) * sizeof(uint32_t), stream, state,
           first, k, numel, offset, out);
  } else {
    const dim3 grid = sample_grid(k, windows_of(offset, numel, kWindow), kTangentWarps);
    launch(sample_normal_kernel<T>, grid, block, kTangentWarps * kWindow * sizeof(C), stream, state, first, k, numel,
           offset, out);
  }
}

}  // namespace frog
