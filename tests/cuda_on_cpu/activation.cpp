#include "cuda/kernels/activation.cuh"

#include "exported.h"

namespace {

// Groups of four elements, a thread each.
template <class C>
void activate_kernel(const C* x, const C* tangent, C* y, C* dy, int64_t groups, int function, C a, C b) {
  const int64_t first = 4 * (int64_t{blockIdx.x} * blockDim.x + threadIdx.x);
  if (first >= 4 * groups) return;
  C in[4], value[4], slope[4];
  for (int j = 0; j < 4; ++j) in[j] = x[first + j];
  frog::activate(function, a, b, in, value, slope);
  for (int j = 0; j < 4; ++j) {
    y[first + j] = value[j];
    dy[first + j] = frog::apply_slope(frog::stops_tangents(function), slope[j], tangent[first + j]);
  }
}

template <class C>
void run(const C* x, const C* tangent, C* y, C* dy, int64_t groups, int64_t function, double a, double b) {
  frog::launch(activate_kernel<C>, dim3(frog::ceil_div(groups, 64)), dim3(64), 0, nullptr, x, tangent, y, dy, groups,
               static_cast<int>(function), static_cast<C>(a), static_cast<C>(b));
}

}  // namespace

EXPORTED(activate_f32)
(const float* x, const float* tangent, float* y, float* dy, int64_t groups, int64_t function, double a, double b) {
  run(x, tangent, y, dy, groups, function, a, b);
}
EXPORTED(activate_f64)
(const double* x, const double* tangent, double* y, double* dy, int64_t groups, int64_t function, double a, double b) {
  run(x, tangent, y, dy, groups, function, a, b);
}
