// y = f(x) and dy_i = f'(x) (dx_i + v_i); csrc/cpu/pointwise.cpp is its twin.
#include "kernels/pointwise.cuh"

#include "../arguments/pointwise.h"
#include "dual.h"

namespace frog {
namespace {

constexpr const char* kOp = "pointwise_jvp";

std::tuple<Tensor, Tensor> pointwise_jvp(const Tensor& x, const std::optional<Tensor>& dx,
                                         const std::optional<Tensor>& activity, int64_t function, double alpha,
                                         double beta) {
  check_floating(kOp, "x", x);
  check_function(kOp, function, alpha, beta);
  if (dx) check_tangents_on_device(kOp, "dx", *dx, x);
  const int64_t k = check_given(kOp, dx, activity);
  if (activity) {
    check_same_device(kOp, "activity", *activity, x);
    check_repeated(kOp, "activity", *activity, shape_of(x), k);
  }
  const OnDevice stream(x);
  const ScalarType result = dx ? dx->scalar_type() : activity->scalar_type();
  // One type for both tangents: where they differ, or one is double, the type that is computed in.
  const KernelTypes types = kernel_types({&x}, {pointer_to(dx), pointer_to(activity)});
  const Tensor x_ = dense_as(x, types.primal);  // [numel]
  const std::optional<Tensor> dx_ = dense_as(dx, types.tangents), v = dense_as(activity, types.tangents);
  Tensor y = new_on(x, shape_of(x), types.primal), dy = new_on(x, tangent_shape(x, k), types.tangents);
  const int64_t period = activity ? std::max<int64_t>(1, v->numel() / k) : 1;
  dispatch_types(kOp, types, [&](auto primal, auto tangent) {
    using X = decltype(primal);
    using T = decltype(tangent);
    launch_pointwise(in<X>(x_), in<T>(dx_), in<T>(v), out<X>(y), out<T>(dy), x.numel(), period, k, function, alpha,
                     beta, stream);
  });
  return {to_dtype(y, x.scalar_type()), to_dtype(dy, result)};
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CUDA, m) { m.impl("pointwise_jvp", TORCH_BOX(&pointwise_jvp)); }

}  // namespace
}  // namespace frog
