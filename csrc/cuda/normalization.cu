// Layer, RMS, group, instance and batch normalisation and their tangents; csrc/cpu/normalization.cpp is its twin.
#include "kernels/normalization.cuh"

#include <limits>

#include "../arguments/normalization.h"
#include "dual.h"

namespace frog {
namespace {

constexpr const char* kOp = "normalization_jvp";

std::optional<Tensor> prepare(const char* name, const std::optional<Tensor>& t, const Tensor& x,
                              const std::vector<int64_t>& expected, ScalarType dtype) {
  if (!t) return std::nullopt;
  check_same_device(kOp, name, *t, x);
  check_floating(kOp, name, *t);
  check_shape(kOp, name, *t, expected);
  return dense_as(*t, dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> normalization_jvp(
    const Tensor& x, const std::optional<Tensor>& dx, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& dweight, const std::optional<Tensor>& bias, const std::optional<Tensor>& dbias,
    const std::optional<Tensor>& mean, const std::optional<Tensor>& var, int64_t outer, int64_t groups,
    int64_t weight_groups, bool centred, double eps) {
  const NormalizationSizes sizes = check_normalization(kOp, x, dx, weight, dweight, bias, dbias, mean, var, outer,
                                                       groups, weight_groups, centred, eps);
  // rows of several runs that do not lie together, or of several factors, are indexed by 32 bits
  STD_TORCH_CHECK(outer * sizes.inner < int64_t{1} << 32 ||
                      (outer == 1 && (sizes.weight_inner == sizes.inner || sizes.weight_inner == 1)),
                  kOp, ": a group has ", outer * sizes.inner, " elements; fewer than 2^32 are accepted on a GPU");
  const OnDevice stream(x);
  // computed, as on the CPU, in double only if x is
  KernelTypes types{x.scalar_type(), sizes.compute};
  if (sizes.compute != ScalarType::Double && sizes.result != ScalarType::Double) {
    types = kernel_types({&x}, {dx ? pointer_to(dx) : dweight ? pointer_to(dweight) : pointer_to(dbias)});
  }
  const Tensor x_ = dense_as(x, types.primal);
  const auto dx_ = prepare("dx", dx, x, sizes.dx_shape, types.tangents);
  const auto w = prepare("weight", weight, x, sizes.w_shape, sizes.compute);
  const auto dw = prepare("dweight", dweight, x, sizes.dw_shape, sizes.compute);
  const auto b = prepare("bias", bias, x, sizes.w_shape, sizes.compute);
  const auto db = prepare("dbias", dbias, x, sizes.dw_shape, sizes.compute);
  const auto m = prepare("mean", mean, x, {groups}, sizes.compute), v = prepare("var", var, x, {groups}, sizes.compute);
  Tensor y = new_on(x, shape_of(x), types.primal), dy = new_on(x, sizes.dx_shape, types.tangents);
  Tensor mean_out = new_on(x, {groups}, sizes.compute), var_out = new_on(x, {groups}, sizes.compute);
  if (x.numel() == 0) {  // statistics of nothing
    torch::stable::fill_(mean_out, std::numeric_limits<double>::quiet_NaN());
    torch::stable::fill_(var_out, std::numeric_limits<double>::quiet_NaN());
  }
  dispatch_types(kOp, types, [&](auto primal, auto tangent) {
    using X = decltype(primal);
    using T = decltype(tangent);
    using C = typename Compute<X>::type;
    launch_normalization(in<X>(x_), in<T>(dx_), in<C>(w), in<C>(dw), in<C>(b), in<C>(db), in<C>(m), in<C>(v), out<X>(y),
                         out<T>(dy), out<C>(mean_out), out<C>(var_out), outer, groups, sizes.inner, sizes.k,
                         weight_groups, sizes.weight_inner, centred, eps, stream);
  });
  return {y, to_dtype(dy, sizes.result), mean_out, var_out};
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CUDA, m) { m.impl("normalization_jvp", TORCH_BOX(&normalization_jvp)); }

}  // namespace
}  // namespace frog
