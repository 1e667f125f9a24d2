// tangent_combine_samples: combinations of drawn tangents whose coefficients change from sample to sample of a batch.
// Windows and the draw are those of combine.cuh; csrc/cpu/tangents.cpp is the twin.
//
// A sample may start anywhere in a window, so each element looks its coefficient up, which caches hold: k x B of them
// for k x B x numel elements. Four elements in a row mostly share one. Nothing but the result is written.
#pragma once

#include "combine.cuh"

namespace frog {

/// All samples of a batch in a row: batch x numel elements.
template <class C>
struct Samples {
  const C* coefficients;  // [k, batch]
  int64_t k, batch, numel;
};

/// Which samples four elements in a row belong to; elements beyond either end count as the nearest one's.
struct SampleQuad {
  int at[4];
  bool same;

  __device__ __forceinline__ void locate(int64_t element, int64_t batch, int64_t numel) {
    const int64_t last = batch * numel - 1;
    int64_t sample = 0, end = 0;  // where the sample ends
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t p = element + e < 0 ? 0 : element + e > last ? last : element + e;
      if (e == 0 || p >= end) sample = p / numel, end = (sample + 1) * numel;
      at[e] = static_cast<int>(sample);
    }
    same = at[0] == at[3];
  }

  /// factors[e]: coefficients of one tangent for the four elements.
  template <class C>
  __device__ __forceinline__ void read(const C* __restrict__ of_tangent, C (&factors)[4]) const {
    factors[0] = of_tangent[at[0]];
#pragma unroll
    for (int e = 1; e < 4; ++e) factors[e] = same ? factors[0] : of_tangent[at[e]];
  }
};

template <class T, class C>
__global__ void __launch_bounds__(kTangentThreads)
    combine_samples_normal_kernel(const int64_t* __restrict__ state, const Samples<C> p, int64_t first, int64_t offset,
                                  const Row<T> row) {
  FROG_SHARED(C, stages);  // [warps, kWindow]
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const Stream stream = read_stream(state);
  const int64_t start = offset / kWindow, windows = windows_of(offset, row.numel, kWindow);
  const int place = 64 * (lane / 8) + normal_place(lane % 8);
  for (int64_t window = int64_t{blockIdx.x} * kTangentWarps + warp; window < windows;
       window += int64_t{gridDim.x} * kTangentWarps) {
    const uint64_t call = static_cast<uint64_t>(start + window) * kWarp + static_cast<uint64_t>(lane);
    const int64_t at = (start + window) * kWindow - offset;
    SampleQuad quads[2];
    quads[0].locate(at + place, p.batch, p.numel);
    quads[1].locate(at + place + 32, p.batch, p.numel);
    C sums[8] = {};
    for (int64_t i = 0; i < p.k; ++i) {
      float drawn[8];
      normal_elements(draw_words(stream, first + i, call), drawn);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        C factors[4];
        quads[h].read(p.coefficients + i * p.batch, factors);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sums[4 * h + e] = fma(static_cast<C>(drawn[4 * h + e]), factors[e], sums[4 * h + e]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) sums[j] = stream.valid ? sums[j] : static_cast<C>(NAN);
    write_window(row, stages + warp * kWindow, at, place, place + 32, sums);
  }
}

template <class T, class C>
__global__ void __launch_bounds__(kTangentThreads)
    combine_samples_signs_kernel(const int64_t* __restrict__ state, const Samples<C> p, int64_t first, int64_t offset,
                                 const Row<T> row) {
  constexpr int kGroup = static_cast<int>(kRademacherGroup), kPieces = kGroup / kWarp / 4;  // of four elements
  FROG_SHARED(C, shared);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  C* const stage = shared + warp * kWindow;  // [warps, kWindow]
  uint32_t* const runs =
      reinterpret_cast<uint32_t*>(shared + kTangentWarps * kWindow) + warp * kSignTangents * 32;  // [warps, .., 32]
  const Stream stream = read_stream(state);
  const int64_t start = offset / kGroup, windows = windows_of(offset, row.numel, kGroup);
  for (int64_t window = int64_t{blockIdx.x} * kTangentWarps + warp; window < windows;
       window += int64_t{gridDim.x} * kTangentWarps) {
    const uint64_t call = static_cast<uint64_t>(start + window) * 8 + static_cast<uint64_t>(lane % 8);
    const int64_t at = (start + window) * kGroup - offset;
    SampleQuad quads[kPieces];
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) quads[piece].locate(at + 128 * piece + 4 * lane, p.batch, p.numel);
    C sums[4 * kPieces] = {};
    for (int64_t i = 0; i < p.k; i += kSignTangents) {
      if (i + lane / 8 < p.k) {
        const PhiloxWords words = draw_words(stream, first + i + lane / 8, call);
#pragma unroll
        for (int w = 0; w < 4; ++w) runs[32 * (lane / 8) + sign_run(lane % 8, w)] = words.w[w];
      }
      __syncwarp();
      const int tangents = static_cast<int>(p.k - i < kSignTangents ? p.k - i : kSignTangents);
      for (int q = 0; q < tangents; ++q) {
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {  // elements 128 piece + 4 lane .. + 3
          const uint32_t four = runs[32 * q + 4 * piece + lane / 8] >> (4 * (lane % 8));
          C factors[4];
          quads[piece].read(p.coefficients + (i + q) * p.batch, factors);
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[4 * piece + e] += signed_by(factors[e], four, e);
        }
      }
      __syncwarp();
    }
#pragma unroll
    for (int j = 0; j < 4 * kPieces; ++j) sums[j] = stream.valid ? sums[j] : static_cast<C>(NAN);
#pragma unroll
    for (int q = 0; q < kPieces / 2; ++q) {
      write_window(row, stage, at + q * kWindow, 4 * lane, 128 + 4 * lane, sums + 8 * q);
    }
  }
}

// As in sgd_basis_kernel, a thread looks through all coordinates for its elements.
template <class T, class C>
__global__ void __launch_bounds__(kTangentThreads)
    combine_samples_basis_kernel(const int64_t* __restrict__ coordinates, const Samples<C> p, int64_t first,
                                 int64_t offset, const Row<T> row) {
  const int64_t* const own = coordinates + first;  // [k]
  for (int64_t at = int64_t{blockIdx.x} * kTangentThreads + threadIdx.x; at < row.numel;
       at += int64_t{gridDim.x} * kTangentThreads) {
    C sum = 0;
    for (int64_t i = 0; i < p.k; ++i) {
      if (own[i] < 0) sum = static_cast<C>(NAN);
      if (own[i] == offset + at) sum += p.coefficients[i * p.batch + at / p.numel];
    }
    row.one(at, sum);
  }
}

/// out [batch, numel]; batch below 2^31.
template <class T>
void launch_combine_samples(const int64_t* state, const Samples<typename Compute<T>::type>& p, T* out, int64_t offset,
                            int64_t first, int64_t distribution, cudaStream_t stream) {
  using C = typename Compute<T>::type;
  const int64_t total = p.batch * p.numel;
  if (total == 0) return;
  const Row<T> row(out, total, offset, false);
  constexpr size_t kStages = kTangentWarps * kWindow * sizeof(C);
  if (distribution == kStandardBasis) {
    launch(combine_samples_basis_kernel<T, C>, combine_grid(ceil_div(total, kTangentThreads)), dim3(kTangentThreads), 0,
           stream, state, p, first, offset, row);
  } else if (distribution == kRademacher) {
    launch(combine_samples_signs_kernel<T, C>,
           combine_grid(ceil_div(windows_of(offset, total, kRademacherGroup), kTangentWarps)), dim3(kTangentThreads),
           kStages + kTangentWarps * kSignTangents * 32 * sizeof(uint32_t), stream, state, p, first, offset, row);
  } else {
    launch(combine_samples_normal_kernel<T, C>,
           combine_grid(ceil_div(windows_of(offset, total, kWindow), kTangentWarps)), dim3(kTangentThreads), kStages,
           stream, state, p, first, offset, row);
  }
}

}  // namespace frog
