// Kernels that draw tangents and use their linear combination at once: written, added to a parameter, or as the
// gradient of a step of SGD. Sums run over the tangents in order, with the CPU's operations; csrc/cpu/tangents.cpp is
// the twin.
//
// Rows and windows are those of tangents.cuh. What becomes of a sum is the business of a row: of Row or SgdRow.
#pragma once

#include "tangents.cuh"

namespace frog {

/// Coefficients that a block holds at a time.
constexpr int kFactors = 512;

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
template <class Target>
__global__ void __launch_bounds__(kTangentThreads)
    combine_normal_kernel(const int64_t* __restrict__ state, const double* __restrict__ coefficients, double alpha,
                          int64_t first, int64_t k, int64_t offset, const Target row) {
  using C = typename Target::C;
  FROG_SHARED(C, shared);
  C* const factors = shared;             // [kFactors]
  C* const stages = factors + kFactors;  // [warps, kWindow]
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const Stream stream = read_stream(state);
  const int64_t start = offset / kWindow, windows = windows_of(offset, row.numel, kWindow);
  const int place = 64 * (lane / 8) + normal_place(lane % 8);
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
template <class Target>
__global__ void __launch_bounds__(kTangentThreads)
    combine_signs_kernel(const int64_t* __restrict__ state, const double* __restrict__ coefficients, double alpha,
                         int64_t first, int64_t k, int64_t offset, const Target row) {
  using C = typename Target::C;
  constexpr int kGroup = static_cast<int>(kRademacherGroup), kPieces = kGroup / kWarp / 4;  // of four elements
  FROG_SHARED(C, shared);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  C* const factors = shared;                             // [kFactors]
  C* const stage = factors + kFactors + warp * kWindow;  // [warps, kWindow]
  uint32_t* const runs = reinterpret_cast<uint32_t*>(factors + kFactors + kTangentWarps * kWindow) +
                         warp * kSignTangents * 32;  // [warps, kSignTangents, 32]
  const Stream stream = read_stream(state);
  const int64_t start = offset / kGroup, windows = windows_of(offset, row.numel, kGroup);
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

/// Blocks of kernels that stride over `blocks` shares of their work.
inline dim3 combine_grid(int64_t blocks) {
  const int64_t filling = blocks_of_device(kTangentBlocks);
  return dim3(static_cast<unsigned>(blocks < filling ? blocks : filling));
}

/// Puts alpha V c through `row`; coefficients [k], distribution normal or Rademacher.
template <class Target>
void launch_drawn_combination(const int64_t* state, const double* coefficients, double alpha, const Target& row,
                              int64_t k, int64_t offset, int64_t first, int64_t distribution, cudaStream_t stream) {
  using C = typename Target::C;
  const size_t shared = (kFactors + kTangentWarps * kWindow) * sizeof(C);
  if (distribution == kRademacher) {
    launch(combine_signs_kernel<Target>,
           combine_grid(ceil_div(windows_of(offset, row.numel, kRademacherGroup), kTangentWarps)),
           dim3(kTangentThreads), shared + kTangentWarps * kSignTangents * 32 * sizeof(uint32_t), stream, state,
           coefficients, alpha, first, k, offset, row);
  } else {
    launch(combine_normal_kernel<Target>, combine_grid(ceil_div(windows_of(offset, row.numel, kWindow), kTangentWarps)),
           dim3(kTangentThreads), shared, stream, state, coefficients, alpha, first, k, offset, row);
  }
}

/// out [numel] (+)= alpha V c; coefficients [k].
template <class T>
void launch_combine(const int64_t* state, const double* coefficients, T* out, int64_t k, int64_t numel, int64_t offset,
                    int64_t first, int64_t distribution, bool add, double alpha, cudaStream_t stream) {
  if (numel == 0) return;
  if (distribution == kStandardBasis) {
    launch(combine_basis_kernel<T>, combine_grid(ceil_div(numel, 4096)), dim3(kTangentThreads), sizeof(int), stream,
           state, coefficients, alpha, first, k, numel, offset, add, out);
  } else {
    launch_drawn_combination(state, coefficients, alpha, Row<T>(out, numel, offset, add), k, offset, first,
                             distribution, stream);
  }
}

// ---- tangent_sgd_

template <class C>
struct SgdStep {
  C lr, momentum, taken, decay;  // taken: 1 - dampening
  bool nesterov, fresh;          // fresh: nothing is in the buffer yet

  /// p and its momentum one step on, with gradient g; the operations of csrc/cpu/tangents.cpp.
  __device__ __forceinline__ void operator()(C g, bool has_momentum, C& p, C& kept) const {
    const C d = decay != 0 ? g + decay * p : g;
    if (!has_momentum) {
      p -= lr * d;
      return;
    }
    kept = fresh ? d : momentum * kept + taken * d;
    p -= lr * (nesterov ? d + momentum * kept : kept);
  }
};

/// A parameter and its momentum, which the sums that a Row would write are the gradient of. Bytes: those of parameter
/// and buffer, read and written once.
template <class T>
struct SgdRow {
  using C = typename Compute<T>::type;
  T *data, *buffer;  // buffer: null without momentum
  int64_t numel;
  bool aligned;
  SgdStep<C> step;

  SgdRow(T* data_, T* buffer_, int64_t numel_, int64_t offset, const SgdStep<C>& step_)
      : data(data_),
        buffer(buffer_),
        numel(numel_),
        aligned(quads_aligned(data_, offset) && (buffer_ == nullptr || quads_aligned(buffer_, offset))),
        step(step_) {}

  __device__ __forceinline__ void four(int64_t at, const C* v) const {
    auto* const to = reinterpret_cast<Pack<T, 4>*>(data + at);
    auto* const keep = reinterpret_cast<Pack<T, 4>*>(buffer != nullptr ? buffer + at : nullptr);
    Pack<T, 4> p = *to, kept{};
    if (keep != nullptr && !step.fresh) kept = *keep;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      C value = widen(p.at[j]), moment = widen(kept.at[j]);
      step(v[j], keep != nullptr, value, moment);
      p.at[j] = narrow<T>(value), kept.at[j] = narrow<T>(moment);
    }
    *to = p;
    if (keep != nullptr) *keep = kept;
  }
  __device__ __forceinline__ void one(int64_t at, C v) const {
    C value = widen(data[at]), moment = buffer != nullptr && !step.fresh ? widen(buffer[at]) : C(0);
    step(v, buffer != nullptr, value, moment);
    data[at] = narrow<T>(value);
    if (buffer != nullptr) buffer[at] = narrow<T>(moment);
  }
};

// All elements move, though few have a gradient: a thread looks through the k coordinates for each of its elements,
// which is still less than drawing it k times.
template <class T>
__global__ void __launch_bounds__(kTangentThreads)
    sgd_basis_kernel(const int64_t* __restrict__ coordinates, const double* __restrict__ coefficients, int64_t first,
                     int64_t k, int64_t offset, const SgdRow<T> row) {
  using C = typename Compute<T>::type;
  const int64_t* const own = coordinates + first;  // [k]
  for (int64_t at = int64_t{blockIdx.x} * kTangentThreads + threadIdx.x; at < row.numel;
       at += int64_t{gridDim.x} * kTangentThreads) {
    C sum = 0;
    for (int64_t i = 0; i < k; ++i) {
      if (own[i] < 0) sum = static_cast<C>(NAN);
      if (own[i] == offset + at) sum += static_cast<C>(coefficients[i]);
    }
    row.one(at, sum);
  }
}

/// A step of SGD of row.data along V c; coefficients [k].
template <class T>
void launch_sgd(const int64_t* state, const double* coefficients, const SgdRow<T>& row, int64_t k, int64_t offset,
                int64_t first, int64_t distribution, cudaStream_t stream) {
  if (row.numel == 0) return;
  if (distribution == kStandardBasis) {
    launch(sgd_basis_kernel<T>, combine_grid(ceil_div(row.numel, kTangentThreads)), dim3(kTangentThreads), 0, stream,
           state, coefficients, first, k, offset, row);
  } else {
    launch_drawn_combination(state, coefficients, 1.0, row, k, offset, first, distribution, stream);
  }
}

}  // namespace frog
