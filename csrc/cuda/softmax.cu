// Softmax, its logarithm and their tangents; csrc/cpu/softmax.cpp is its twin.
#include "kernels/softmax.cuh"

#include "../arguments/softmax.h"
#include "dual.h"

namespace frog {
namespace {

std::tuple<Tensor, Tensor> softmax_of(const char* op, bool log, const Tensor& x, const Tensor& dx, int64_t dim) {
  check_floating(op, "x", x);
  check_tangents_on_device(op, "dx", dx, x);
  const SoftmaxSizes sizes = check_softmax(op, x, dim);
  const OnDevice stream(x);
  const int64_t k = dx.size(0);
  const KernelTypes types = kernel_types({&x}, {&dx});
  const Tensor x_ = dense_as(x, types.primal), dx_ = dense_as(dx, types.tangents);
  Tensor y = new_on(x, shape_of(x), types.primal), dy = new_on(x, tangent_shape(x, k), types.tangents);
  dispatch_types(op, types, [&](auto primal, auto tangent) {
    using X = decltype(primal);
    using T = decltype(tangent);
    launch_softmax(in<X>(x_), in<T>(dx_), out<X>(y), out<T>(dy), sizes.outer, sizes.classes, sizes.inner, k, log,
                   stream);
  });
  return {to_dtype(y, x.scalar_type()), to_dtype(dy, dx.scalar_type())};
}

std::tuple<Tensor, Tensor> softmax_jvp(const Tensor& x, const Tensor& dx, int64_t dim) {
  return softmax_of("softmax_jvp", false, x, dx, dim);
}
std::tuple<Tensor, Tensor> log_softmax_jvp(const Tensor& x, const Tensor& dx, int64_t dim) {
  return softmax_of("log_softmax_jvp", true, x, dx, dim);
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CUDA, m) {
  m.impl("softmax_jvp", TORCH_BOX(&softmax_jvp));
  m.impl("log_softmax_jvp", TORCH_BOX(&log_softmax_jvp));
}

}  // namespace
}  // namespace frog
