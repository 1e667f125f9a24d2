// tangent_sum: a + va + alpha (b + vb) for k tangents; va and vb are shorter and repeated.
//
// Floor: a and b are read and the result written once, 3 k numel elements; va and vb stay in the cache. A thread takes
// 32 bytes of each operand, read before the first is needed.
#pragma once

#include "elementwise.cuh"

namespace frog {

constexpr int kSumThreads = 256;
template <class T>
constexpr int kSumElements = 2 * kPack<T>;

/// k tangents [k, period] of a row that is repeated over numel; null: not given.
template <class T>
struct Repeated {
  const T* data;
  int64_t period;
  bool packed;  // rows may be read 16 bytes at a time
};

template <int N, bool kPacked, class T>
__device__ __forceinline__ Values<T, N> read_repeated(const Repeated<T>& v, int64_t i, const Slots<kPacked>& slots) {
  const T* const row = v.data + i * v.period;
  if constexpr (kPacked) {
    if (v.packed) {
      // numel and the period are multiples of N: the elements of a thread are neighbours here too
      return read<N>(row, Slots<true>{slots.first < slots.count ? slots.first % v.period : v.period, v.period, 1},
                     IsElement());
    }
  }
  Values<T, N> out;
#pragma unroll
  for (int j = 0; j < N; ++j) out.at(j) = slots.holds(j) ? row[slots.element(j) % v.period] : zero_of<T>();
  return out;
}

// grid (parts of numel, k or fewer)
template <bool kPacked, class T>
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const T* __restrict__ a, Repeated<T> va, const T* __restrict__ b, Repeated<T> vb,
               typename Compute<T>::type alpha, T* __restrict__ out, int64_t numel, int64_t k) {
  using C = typename Compute<T>::type;
  constexpr int N = kSumElements<T>;
  const int64_t start = int64_t{blockIdx.x} * kSumThreads * N, t = threadIdx.x;
  const Slots<kPacked> slots{kPacked ? start + t * N : start + t, numel, kPacked ? 1 : kSumThreads};
  if (slots.first >= numel) return;
  for (int64_t i = blockIdx.y; i < k; i += gridDim.y) {
    const Values<T, N> first = read<N>(a + i * numel, slots, IsElement());
    Values<T, N> second, shift_a, shift_b;
    if (b != nullptr) second = read<N>(b + i * numel, slots, IsElement());
    if (va.data != nullptr) shift_a = read_repeated<N>(va, i, slots);
    if (vb.data != nullptr) shift_b = read_repeated<N>(vb, i, slots);
    Values<T, N> sum;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      C s = widen(first.at(j));
      if (va.data != nullptr) s += widen(shift_a.at(j));
      if (b != nullptr) s += alpha * widen(second.at(j));
      if (vb.data != nullptr) s += alpha * widen(shift_b.at(j));
      sum.at(j) = narrow<T>(s);
    }
    write<N>(out + i * numel, slots, IsElement(), sum);
  }
}

/// a, b, out [k, numel]; va [k, a_period], vb [k, b_period]; b, va, vb may be null.
template <class T>
void launch_sum(const T* a, const T* va, int64_t a_period, const T* b, const T* vb, int64_t b_period, double alpha,
                T* out, int64_t numel, int64_t k, cudaStream_t stream) {
  if (numel == 0) return;
  constexpr int N = kSumElements<T>;
  const bool packed = aligned16(a) && aligned16(b) && aligned16(out) && numel % N == 0;
  const auto repeated = [&](const T* v, int64_t period) {
    return Repeated<T>{v, period, aligned16(v) && period % N == 0};
  };
  const dim3 grid(ceil_div(numel, int64_t{kSumThreads} * N), k < 65535 ? k : 65535);
  const auto go = [&](auto kernel) {
    launch(kernel, grid, dim3(kSumThreads), 0, stream, a, repeated(va, a_period), b, repeated(vb, b_period),
           static_cast<typename Compute<T>::type>(alpha), out, numel, k);
  };
  if (packed) {
    go(sum_kernel<true, T>);
  } else {
    go(sum_kernel<false, T>);
  }
}

}  // namespace frog
