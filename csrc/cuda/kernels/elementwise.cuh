// What the elementwise operators share: y = f(x) and dy_i = f'(x) (a_i + sign b_i) for k tangents.
//
// Floor: the primal is read and y written once, a (and b, unless it is repeated) read and dy written once for each
// tangent. A thread takes 16 bytes or more of each, forms value and slope once, in registers, and applies the slope to
// tangent after tangent, kAhead of which are read before the first is needed. Where the primal alone does not fill the
// device, parts of the tangents get threads of their own, and these read the primal again.
#pragma once

#include "activation.cuh"
#include "packs.cuh"

namespace frog {

constexpr int kElementwiseThreads = 256;
constexpr int kUnpacked = 2;  // elements of a thread where they cannot be read 16 bytes at a time

/// Tangents a [k, numel] and b [k, period], which is repeated over numel; null: not given.
template <class T>
struct Tangents {
  const T *a, *b;
  int64_t period;
  int sign;  // of b
};

struct IsElement {
  __device__ __forceinline__ int64_t operator()(int64_t e) const { return e; }
};

// Primal: its operator()(slots, y, slope) reads the primal and gives value and slope; stops() as in stops_tangents.
template <bool kPacked, class X, class T, class Primal>
__global__ void __launch_bounds__(kElementwiseThreads)
    elementwise_kernel(Primal primal, Tangents<T> tangents, X* __restrict__ y, T* __restrict__ dy, int64_t numel,
                       int64_t k, int64_t per_part, bool b_packed) {
  using C = typename Compute<X>::type;
  constexpr int N = kPacked ? kElements<X, T> : kUnpacked;
  constexpr int kAhead = N * sizeof(T) > 16 ? 2 : 4;
  const int64_t start = int64_t{blockIdx.x} * kElementwiseThreads * N, t = threadIdx.x;
  const Slots<kPacked> slots{kPacked ? start + t * N : start + t, numel, kPacked ? 1 : kElementwiseThreads};
  if (slots.first >= numel) return;
  const int64_t first = blockIdx.y * per_part, last = first + per_part < k ? first + per_part : k;

  // Where the first element lies in b, whose length any number of rows may share, and how far the next one is.
  const int64_t period = tangents.period, hop = kPacked ? 1 : kElementwiseThreads % period;
  int64_t place = slots.first;
  if (tangents.b != nullptr && place >= period) {  // a division of 32 bits takes a fraction of the time
    place =
        place <= INT64_C(0xFFFFFFFF) ? static_cast<uint32_t>(place) % static_cast<uint32_t>(period) : place % period;
  }
  const auto read_b = [&](int64_t i) {
    const T* const b = tangents.b + i * period;
    if constexpr (kPacked) {
      if (b_packed) return read<N>(b, Slots<true>{place, period, 1}, IsElement());
    }
    Values<T, N> v;
    int64_t at = place;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      v.at(j) = slots.holds(j) ? b[at] : zero_of<T>();
      at += hop;
      if (at >= period) at -= period;
    }
    return v;
  };

  C value[N], slope[N];
  const C sign = static_cast<C>(tangents.sign);
  const bool stops = primal.stops();
  for (int64_t i = first; i < last; i += kAhead) {
    Values<T, N> a[kAhead], b[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (i + u >= last) continue;
      if (tangents.a != nullptr) a[u] = read<N>(tangents.a + (i + u) * numel, slots, IsElement());
      if (tangents.b != nullptr) b[u] = read_b(i + u);
    }
    if (i == first) {
      primal(slots, value, slope);
      if (blockIdx.y == 0) {
        Values<X, N> v;
#pragma unroll
        for (int j = 0; j < N; ++j) v.at(j) = narrow<X>(value[j]);
        write<N>(y, slots, IsElement(), v);
      }
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (i + u >= last) continue;
      Values<T, N> v;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        C moved = tangents.a != nullptr ? widen(a[u].at(j)) : C(0);
        if (tangents.b != nullptr) moved += sign * widen(b[u].at(j));
        v.at(j) = narrow<T>(apply_slope(stops, slope[j], moved));
      }
      write<N>(dy + (i + u) * numel, slots, IsElement(), v);
    }
  }
}

/// primal_packed: the primal's tensors all start at multiples of 16 bytes.
template <class X, class T, class Primal>
void launch_elementwise(const Primal& primal, bool primal_packed, const Tangents<T>& tangents, X* y, T* dy,
                        int64_t numel, int64_t k, cudaStream_t stream) {
  if (numel == 0) return;
  constexpr int N = kElements<X, T>;
  const bool packed = primal_packed && aligned16(tangents.a) && aligned16(y) && aligned16(dy) && numel % N == 0;
  const bool b_packed = packed && aligned16(tangents.b) && tangents.period % N == 0;
  const int64_t blocks = ceil_div(numel, int64_t{kElementwiseThreads} * (packed ? N : kUnpacked));
  const int64_t parts = min(ceil_div(k, 4), max(int64_t{1}, blocks_of_device(8) / blocks));
  const int64_t per_part = ceil_div(k, 4 * parts) * 4;
  const auto go = [&](auto kernel) {
    launch(kernel, dim3(blocks, ceil_div(k, per_part)), dim3(kElementwiseThreads), 0, stream, primal, tangents, y, dy,
           numel, k, per_part, b_packed);
  };
  if (packed) {
    go(elementwise_kernel<true, X, T, Primal>);
  } else {
    go(elementwise_kernel<false, X, T, Primal>);
  }
}

/// Reads N elements of a tensor of the primal in the type that is computed in.
template <int N, bool kPacked, class X, class C>
__device__ __forceinline__ void read_wide(const X* p, const Slots<kPacked>& slots, C (&out)[N]) {
  const Values<X, N> v = read<N>(p, slots, IsElement());
#pragma unroll
  for (int j = 0; j < N; ++j) out[j] = widen(v.at(j));
}

}  // namespace frog
