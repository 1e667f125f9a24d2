// Kernels that write drawn tangents or their linear combinations. The draw is that of csrc/distributions.h, so the CPU
// operators give the same elements; sums run over the tangents in order, with the CPU's operations.
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
/// Coefficients that a block holds at a time.
constexpr int kFactors = 512;

// ---- writing

/// A row of results. `at` below is where the first element of a window lies in it; it may lie before the row's start.
template <class T>
struct Row {
  T* data;
  int64_t numel;
  bool add;      // to what is there
  bool aligned;  // four elements from a multiple of four of the global vector on can be accessed at once

  __device__ Row(T* data_, int64_t numel_, int64_t offset, bool add_)
      : data(data_),
        numel(numel_),
        add(add_),
        aligned((reinterpret_cast<uintptr_t>(data_) - static_cast<uint64_t>(offset) * sizeof(T)) % (4 * sizeof(T)) ==
                0) {}
};

/// Writes the window's elements place .. place + 3 from v[0..3] and second .. second + 3 from v[4..7]. All lanes of the
/// warp call this; together they hold all kWindow elements. `stage` [kWindow] is the warp's own.
template <class T, class C>
__device__ __forceinline__ void write_window(const Row<T>& row, C* stage, int64_t at, int place, int second,
                                             const C v[8]) {
  if (row.aligned && at >= 0 && at + kWindow <= row.numel) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      auto* const to = reinterpret_cast<Pack<T, 4>*>(row.data + at + (half ? second : place));
      Pack<T, 4> pack;
      if (row.add) pack = *to;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        pack.at[j] = narrow<T>(row.add ? widen(pack.at[j]) + v[4 * half + j] : v[4 * half + j]);
      }
      *to = pack;
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    stage[place + j] = v[j];
    stage[second + j] = v[4 + j];
  }
  __syncwarp();
  for (int e = static_cast<int>(threadIdx.x) % kWarp; e < kWindow; e += kWarp) {
    if (at + e >= 0 && at + e < row.numel) {
      T* const to = row.data + at + e;
      *to = narrow<T>(row.add ? widen(*to) + stage[e] : stage[e]);
    }
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

// ---- tangent_combine and tangent_axpy_: out (+)= sum_i alpha c_i v_i

/// Coefficients from .. from + count of c [k] times alpha, in the precision of the sums; NaN if the stream is none.
template <class C>
__device__ __forceinline__ void load_factors(const double* __restrict__ coefficients, double alpha, bool valid,
                                             int64_t from, int64_t count, C* factors) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kTangentThreads) {
    factors[i] = static_cast<C>(valid ? alpha * coefficients[from + i] : static_cast<double>(NAN));
  }
}

// Every thread sums its call's eight elements over all tangents in registers: bytes are those of the result (twice, if
// it is added), arithmetic is that of drawing k tangents.
template <class T>
__global__ void __launch_bounds__(kTangentThreads)
    combine_normal_kernel(const int64_t* __restrict__ state, const double* __restrict__ coefficients, double alpha,
                          int64_t first, int64_t k, int64_t numel, int64_t offset, bool add, T* __restrict__ out) {
  using C = typename Compute<T>::type;
  FROG_SHARED(C, shared);
  C* const factors = shared;             // [kFactors]
  C* const stages = factors + kFactors;  // [warps, kWindow]
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const Stream stream = read_stream(state);
  const int64_t start = offset / kWindow, windows = windows_of(offset, numel, kWindow);
  const int place = 64 * (lane / 8) + normal_place(lane % 8);
  const Row<T> row(out, numel, offset, add);
  int64_t held = -1;  // from which coefficient on they are in shared memory
  for (int64_t base = int64_t{blockIdx.x} * kTangentWarps; base < windows;  // the same for all threads: barriers below
       base += int64_t{gridDim.x} * kTangentWarps) {
    const int64_t window = base + warp;
    const uint64_t call = static_cast<uint64_t>(start + window) * kWarp + static_cast<uint64_t>(lane);
    C sums[8] = {};
    for (int64_t from = 0; from < k; from += kFactors) {
      const int count = static_cast<int>(k - from < kFactors ? k - from : kFactors);
      if (held != from) {
        __syncthreads();
        load_factors(coefficients, alpha, stream.valid, from, count, factors);
        __syncthreads();
        held = from;
      }
      if (window >= windows) continue;
      for (int i = 0; i < count; ++i) {
        float drawn[8];
        normal_elements(draw_words(stream, first + from + i, call), drawn);
        const C c = factors[i];
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[j] = fma(static_cast<C>(drawn[j]), c, sums[j]);
      }
    }
    if (window >= windows) continue;
    write_window(row, stages + warp * kWindow, (start + window) * kWindow - offset, place, place + 32, sums);
  }
}

/// Tangents that a warp draws at a time for one group of 1024 elements: eight calls each, one to a lane.
constexpr int kSignTangents = 4;

// A warp sums a group of 1024 elements, 32 to a lane. An element times c takes a shift, an XOR and an addition; the
// words of four tangents, drawn by all lanes, come from shared memory, one for four elements.
template <class T>
__global__ void __launch_bounds__(kTangentThreads)
    combine_signs_kernel(const int64_t* __restrict__ state, const double* __restrict__ coefficients, double alpha,
                         int64_t first, int64_t k, int64_t numel, int64_t offset, bool add, T* __restrict__ out) {
  using C = typename Compute<T>::type;
  constexpr int kGroup = static_cast<int>(kRademacherGroup), kPieces = kGroup / kWarp / 4;  // of four elements
  FROG_SHARED(C, shared);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  C* const factors = shared;                             // [kFactors]
  C* const stage = factors + kFactors + warp * kWindow;  // [warps, kWindow]
  uint32_t* const runs = reinterpret_cast<uint32_t*>(factors + kFactors + kTangentWarps * kWindow) +
                         warp * kSignTangents * 32;  // [warps, kSignTangents, 32]
  const Stream stream = read_stream(state);
  const int64_t start = offset / kGroup, windows = windows_of(offset, numel, kGroup);
  const Row<T> row(out, numel, offset, add);
  int64_t held = -1;
  for (int64_t base = int64_t{blockIdx.x} * kTangentWarps; base < windows; base += int64_t{gridDim.x} * kTangentWarps) {
    const int64_t window = base + warp;
    const uint64_t call = static_cast<uint64_t>(start + window) * 8 + static_cast<uint64_t>(lane % 8);
    C sums[4 * kPieces] = {};
    for (int64_t from = 0; from < k; from += kFactors) {
      const int count = static_cast<int>(k - from < kFactors ? k - from : kFactors);
      if (held != from) {
        __syncthreads();
        load_factors(coefficients, alpha, stream.valid, from, count, factors);
        __syncthreads();
        held = from;
      }
      if (window >= windows) continue;
      for (int i = 0; i < count; i += kSignTangents) {
        if (i + lane / 8 < count) {
          const PhiloxWords words = draw_words(stream, first + from + i + lane / 8, call);
#pragma unroll
          for (int w = 0; w < 4; ++w) runs[32 * (lane / 8) + sign_run(lane % 8, w)] = words.w[w];
        }
        __syncwarp();
        const int tangents = count - i < kSignTangents ? count - i : kSignTangents;
        for (int q = 0; q < tangents; ++q) {
          const C c = factors[i + q];
#pragma unroll
          for (int piece = 0; piece < kPieces; ++piece) {  // elements 128 piece + 4 lane .. + 3
            const uint32_t four = runs[32 * q + 4 * piece + lane / 8] >> (4 * (lane % 8));
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[4 * piece + j] += signed_by(c, four, j);
          }
        }
        __syncwarp();
      }
    }
    if (window >= windows) continue;
#pragma unroll
    for (int q = 0; q < kPieces / 2; ++q) {
      write_window(row, stage, (start + window) * kGroup - offset + q * kWindow, 4 * lane, 128 + 4 * lane,
                   sums + 8 * q);
    }
  }
}

// A standard basis has at most k elements that are not zero. A block owns a part of the result; of tangents that share
// a coordinate the first adds up all of them, in order.
template <class T>
__global__ void __launch_bounds__(kTangentThreads)
    combine_basis_kernel(const int64_t* __restrict__ coordinates, const double* __restrict__ coefficients, double alpha,
                         int64_t first, int64_t k, int64_t numel, int64_t offset, bool add, T* __restrict__ out) {
  using C = typename Compute<T>::type;
  FROG_SHARED(int, bad);
  const int t = static_cast<int>(threadIdx.x);
  const int64_t* const own = coordinates + first;  // [k]
  const int64_t share = ceil_div(numel, gridDim.x), low = blockIdx.x * share;
  const int64_t high = low + share < numel ? low + share : numel;
  if (t == 0) *bad = 0;
  __syncthreads();
  for (int64_t i = t; i < k; i += kTangentThreads) {
    if (own[i] < 0) *bad = 1;
  }
  __syncthreads();
  if (*bad) return fill_run(out, low, high, t, kTangentThreads, not_a_number<T>());
  if (!add) fill_run(out, low, high, t, kTangentThreads, narrow<T>(0));
  __syncthreads();
  for (int64_t i = t; i < k; i += kTangentThreads) {
    const int64_t hit = own[i] - offset;
    if (hit < low || hit >= high) continue;
    bool is_first = true;
    for (int64_t j = 0; j < i && is_first; ++j) is_first = own[j] != own[i];
    if (!is_first) continue;
    C sum = 0;
    for (int64_t j = i; j < k; ++j) {
      if (own[j] == own[i]) sum += static_cast<C>(alpha * coefficients[j]);
    }
    out[hit] = narrow<T>(add ? widen(out[hit]) + sum : sum);
  }
}

/// out [numel] (+)= alpha V c; coefficients [k].
template <class T>
void launch_combine(const int64_t* state, const double* coefficients, T* out, int64_t k, int64_t numel, int64_t offset,
                    int64_t first, int64_t distribution, bool add, double alpha, cudaStream_t stream) {
  using C = typename Compute<T>::type;
  if (numel == 0) return;
  const auto run = [&](auto kernel, int64_t blocks, size_t shared) {
    const int64_t filling = blocks_of_device(kTangentBlocks);
    launch(kernel, dim3(static_cast<unsigned>(blocks < filling ? blocks : filling)), dim3(kTangentThreads), shared,
           stream, state, coefficients, alpha, first, k, numel, offset, add, out);
  };
  const size_t shared = (kFactors + kTangentWarps * kWindow) * sizeof(C);
  if (distribution == kStandardBasis) {
    run(combine_basis_kernel<T>, ceil_div(numel, 4096), sizeof(int));
  } else if (distribution == kRademacher) {
    run(combine_signs_kernel<T>, ceil_div(windows_of(offset, numel, kRademacherGroup), kTangentWarps),
        shared + kTangentWarps * kSignTangents * 32 * sizeof(uint32_t));
  } else {
    run(combine_normal_kernel<T>, ceil_div(windows_of(offset, numel, kWindow), kTangentWarps), shared);
  }
}

}  // namespace frog
