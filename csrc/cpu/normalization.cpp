// normalization_jvp: layer, RMS, group, instance and batch normalisation and their tangents.
//
// All of them normalise groups of elements of x viewed as [outer, groups, inner]: layer and RMS norm have one group for
// each row (outer = 1), group and instance norm one for each sample and group of channels (outer = 1), batch norm one
// for each channel (outer = batch). With x^ = (x - mean) r and r = 1 / sqrt(var + eps),
//   y  = w x^ + b
//   dy = w r (dx - mean(dx) - x^ mean(dx x^)) + dw x^ + db
// where RMS norm has no means of x and dx, and given statistics (batch norm in evaluation) leave w r dx. The statistics
// and x^ of a group are computed once for all k tangents.
//
// Floor: x and dx are read twice where a group does not stay in first-level cache, y and dy are written once.
#include <cmath>
#include <limits>

#include "../arguments/normalization.h"
#include "blocks.h"
#include "product.h"

namespace frog {
namespace {

constexpr const char* kOp = "normalization_jvp";

template <class T>
struct Simd;
template <>
struct Simd<float> {
  static constexpr auto normalise = &SimdKernels::normalise_f32;
  static constexpr auto scratch = &SimdKernels::normalisation_scratch_f32;
};
template <>
struct Simd<double> {
  static constexpr auto normalise = &SimdKernels::normalise_f64;
  static constexpr auto scratch = &SimdKernels::normalisation_scratch_f64;
};

template <class T>
void run(const Normalization<T>& p) {
  if (p.numel() == 0) {  // statistics of nothing
    std::fill(p.mean, p.mean + p.groups, std::numeric_limits<T>::quiet_NaN());
    std::fill(p.var, p.var + p.groups, std::numeric_limits<T>::quiet_NaN());
    return;
  }
  const int64_t each = std::max<int64_t>(1, 4 * p.outer * p.inner * (1 + p.k));  // an element is gone over four times
  torch::stable::parallel_for(0, p.groups, std::max<int64_t>(1, kWork / each), [&](int64_t from, int64_t to) {
    Scratch<T> scratch((simd().*Simd<T>::scratch)(p));
    (simd().*Simd<T>::normalise)(p, from, to, scratch.data());
  });
}

// Checked, dense and in the compute type; tangents in bfloat16 stay what they are where that is float.
std::optional<Tensor> prepare(const char* name, const std::optional<Tensor>& t, const std::vector<int64_t>& expected,
                              ScalarType compute) {
  if (!t) return std::nullopt;
  check_cpu(kOp, name, *t);
  check_floating(kOp, name, *t);
  check_shape(kOp, name, *t, expected);
  return as_contiguous(to_dtype(*t, compute));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> normalization_jvp(
    const Tensor& x, const std::optional<Tensor>& dx, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& dweight, const std::optional<Tensor>& bias, const std::optional<Tensor>& dbias,
    const std::optional<Tensor>& mean, const std::optional<Tensor>& var, int64_t outer, int64_t groups,
    int64_t weight_groups, bool centred, double eps) {
  check_cpu(kOp, "x", x);
  const NormalizationSizes sizes = check_normalization(kOp, x, dx, weight, dweight, bias, dbias, mean, var, outer,
                                                       groups, weight_groups, centred, eps);
  const int64_t inner = sizes.inner, k = sizes.k, weight_inner = sizes.weight_inner;
  const ScalarType compute = sizes.compute;
  const std::vector<int64_t>&dx_shape = sizes.dx_shape, &w_shape = sizes.w_shape, &dw_shape = sizes.dw_shape;
  const bool low_in = dx && reads_low(dx->scalar_type(), compute), low_out = reads_low(sizes.result, compute);
  const auto x_ = prepare("x", x, shape_of(x), compute);
  const auto dx_ = prepare("dx", dx, dx_shape, low_in ? ScalarType::BFloat16 : compute);
  const auto w_ = prepare("weight", weight, w_shape, compute), dw_ = prepare("dweight", dweight, dw_shape, compute);
  const auto b_ = prepare("bias", bias, w_shape, compute), db_ = prepare("dbias", dbias, dw_shape, compute);
  const auto m_ = prepare("mean", mean, {groups}, compute), v_ = prepare("var", var, {groups}, compute);

  auto [y, dy] = new_dual(x, shape_of(x), k, compute, low_out ? ScalarType::BFloat16 : compute);
  Tensor mean_out = new_tensor(x, {groups}, compute), var_out = new_tensor(x, {groups}, compute);
  const auto go = [&, &y = y, &dy = dy](auto zero) {
    using T = decltype(zero);
    const auto data = [](const std::optional<Tensor>& t) {
      return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
    };
    run(Normalization<T>{outer,
                         groups,
                         inner,
                         k,
                         weight_groups,
                         weight_inner,
                         centred,
                         eps,
                         data(x_),
                         low_in ? nullptr : data(dx_),
                         data(w_),
                         data(dw_),
                         data(b_),
                         data(db_),
                         data(m_),
                         data(v_),
                         static_cast<T*>(y.mutable_data_ptr()),
                         low_out ? nullptr : static_cast<T*>(dy.mutable_data_ptr()),
                         static_cast<T*>(mean_out.mutable_data_ptr()),
                         static_cast<T*>(var_out.mutable_data_ptr()),
                         low_in ? static_cast<const uint16_t*>(dx_->const_data_ptr()) : nullptr,
                         low_out ? static_cast<uint16_t*>(dy.mutable_data_ptr()) : nullptr});
  };
  if (compute == ScalarType::Double) {
    go(double{});
  } else {
    go(float{});
  }
  return {to_dtype(y, x.scalar_type()), to_dtype(dy, sizes.result), mean_out, var_out};
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CPU, m) { m.impl("normalization_jvp", TORCH_BOX(&normalization_jvp)); }

}  // namespace
}  // namespace frog
