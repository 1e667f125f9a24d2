// pointwise_jvp: y = f(x) and dy_i = f'(x) (dx_i + v_i).
#pragma once

#include "activation.cuh"
#include "elementwise.cuh"

namespace frog {

template <class X>
struct PointwisePrimal {
  using C = typename Compute<X>::type;
  const X* x;
  int function;
  C alpha, beta;

  __device__ __forceinline__ bool stops() const { return stops_tangents(function); }
  template <int N, bool kPacked>
  __device__ __forceinline__ void operator()(const Slots<kPacked>& slots, C (&y)[N], C (&slope)[N]) const {
    C in[N];
    read_wide(x, slots, in);
    activate(function, alpha, beta, in, y, slope);
  }
};

/// x, y [numel]; dx, dy [k, numel]; activity [k, period], repeated over numel; dx or activity may be null.
template <class X, class T>
void launch_pointwise(const X* x, const T* dx, const T* activity, X* y, T* dy, int64_t numel, int64_t period, int64_t k,
                      int64_t function, double alpha, double beta, cudaStream_t stream) {
  using C = typename Compute<X>::type;
  launch_elementwise(PointwisePrimal<X>{x, static_cast<int>(function), static_cast<C>(alpha), static_cast<C>(beta)},
                     aligned16(x), Tangents<T>{dx, activity, period, 1}, y, dy, numel, k, stream);
}

}  // namespace frog
