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

#include "product.h"

namespace frog {
namespace {

constexpr const char* kOp = "normalization_jvp";
constexpr int64_t kWork = 32768;  // elements of primal and tangents that are worth a thread

template <class T>
struct Simd;
template <>
struct Simd<float> {
  static constexpr auto normalise = &SimdKernels::normalise_f32;
};
template <>
struct Simd<double> {
  static constexpr auto normalise = &SimdKernels::normalise_f64;
};

template <class T>
void run(const Normalization<T>& p) {
  if (p.numel() == 0) {  // statistics of nothing
    std::fill(p.mean, p.mean + p.groups, std::numeric_limits<T>::quiet_NaN());
    std::fill(p.var, p.var + p.groups, std::numeric_limits<T>::quiet_NaN());
    return;
  }
  const int64_t each = std::max<int64_t>(1, p.outer * p.inner * (1 + p.k));
  torch::stable::parallel_for(0, p.groups, std::max<int64_t>(1, kWork / each), [&](int64_t from, int64_t to) {
    Scratch<T> scratch(3 * p.outer * p.inner);
    for (int64_t g = from; g < to; ++g) (simd().*Simd<T>::normalise)(p, g, scratch.data());
  });
}

std::optional<Tensor> prepare(const char* name, const std::optional<Tensor>& t, const std::vector<int64_t>& expected,
                              ScalarType compute) {
  if (!t) return std::nullopt;
  check_cpu(kOp, name, *t);
  check_floating(kOp, name, *t);
  check_shape(kOp, name, *t, expected);
  return torch::stable::contiguous(to_dtype(*t, compute));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> normalization_jvp(
    const Tensor& x, const std::optional<Tensor>& dx, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& dweight, const std::optional<Tensor>& bias, const std::optional<Tensor>& dbias,
    const std::optional<Tensor>& mean, const std::optional<Tensor>& var, int64_t outer, int64_t groups,
    int64_t weight_groups, bool centred, double eps) {
  check_cpu(kOp, "x", x);
  check_floating(kOp, "x", x);
  STD_TORCH_CHECK(outer >= 0 && groups >= 0, kOp, ": outer and groups are ", outer, " and ", groups,
                  "; they must not be negative");
  const int64_t rows = outer * groups;
  STD_TORCH_CHECK(rows == 0 ? x.numel() == 0 : x.numel() % rows == 0, kOp, ": x has ", x.numel(),
                  " elements, which outer x groups = ", outer, " x ", groups, " does not divide");
  const int64_t inner = rows == 0 ? 0 : x.numel() / rows;
  STD_TORCH_CHECK(weight_groups >= 1 && groups % weight_groups == 0, kOp, ": weight_groups is ", weight_groups,
                  "; expected a divisor of groups = ", groups);
  STD_TORCH_CHECK(dx || dweight || dbias, kOp, ": nothing is perturbed; give at least one of dx, dweight and dbias");
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), kOp, ": mean and var must be given together or not at all");
  STD_TORCH_CHECK(!mean || centred, kOp, ": mean is given, but centred is false");
  STD_TORCH_CHECK(!dweight || weight, kOp, ": dweight is given, but weight is None");
  STD_TORCH_CHECK(!dbias || bias, kOp, ": dbias is given, but bias is None");
  STD_TORCH_CHECK(eps >= 0, kOp, ": eps is ", eps, "; it must not be negative");

  const Tensor& some = weight ? *weight : bias ? *bias : x;
  const int64_t weights = weight || bias ? some.numel() : weight_groups;
  const int64_t weight_inner = weights / weight_groups;
  STD_TORCH_CHECK(weights % weight_groups == 0 && (inner == 0 || (weight_inner >= 1 && inner % weight_inner == 0)), kOp,
                  ": weight has ", weights, " elements, expected weight_groups = ", weight_groups,
                  " times a divisor of the ", inner, " elements of a row");
  const Tensor& moved = dx ? *dx : dweight ? *dweight : *dbias;
  STD_TORCH_CHECK(moved.dim() >= 1, kOp, ": a tangent has shape (), expected (k, *)");
  const int64_t k = moved.size(0);
  check_k(kOp, k);
  const ScalarType compute = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  std::vector<int64_t> dx_shape = shape_of(x), w_shape = weight || bias ? shape_of(some) : std::vector<int64_t>{};
  dx_shape.insert(dx_shape.begin(), k);
  std::vector<int64_t> dw_shape = w_shape;
  dw_shape.insert(dw_shape.begin(), k);
  const auto x_ = prepare("x", x, shape_of(x), compute), dx_ = prepare("dx", dx, dx_shape, compute);
  const auto w_ = prepare("weight", weight, w_shape, compute), dw_ = prepare("dweight", dweight, dw_shape, compute);
  const auto b_ = prepare("bias", bias, w_shape, compute), db_ = prepare("dbias", dbias, dw_shape, compute);
  const auto m_ = prepare("mean", mean, {groups}, compute), v_ = prepare("var", var, {groups}, compute);

  Tensor buffer = new_tensor(x, {1 + k, x.numel()}, compute);  // neighbours, for a linear layer that follows
  Tensor y = part_of(buffer, 0, shape_of(x)), dy = part_of(buffer, x.numel(), dx_shape);
  Tensor mean_out = new_tensor(x, {groups}, compute), var_out = new_tensor(x, {groups}, compute);
  const auto go = [&](auto zero) {
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
                         data(dx_),
                         data(w_),
                         data(dw_),
                         data(b_),
                         data(db_),
                         data(m_),
                         data(v_),
                         static_cast<T*>(y.mutable_data_ptr()),
                         static_cast<T*>(dy.mutable_data_ptr()),
                         static_cast<T*>(mean_out.mutable_data_ptr()),
                         static_cast<T*>(var_out.mutable_data_ptr())});
  };
  if (compute == ScalarType::Double) {
    go(double{});
  } else {
    go(float{});
  }
  return {to_dtype(y, x.scalar_type()), to_dtype(dy, moved.scalar_type()), mean_out, var_out};
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CPU, m) { m.impl("normalization_jvp", TORCH_BOX(&normalization_jvp)); }

}  // namespace
}  // namespace frog
