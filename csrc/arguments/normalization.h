// Arguments of normalization_jvp, checked alike on every device.
#pragma once

#include "../checks.h"

namespace frog {

struct NormalizationSizes {
  int64_t inner, k, weight_inner;
  ScalarType compute, result;  // result: of dy
  std::vector<int64_t> dx_shape, w_shape, dw_shape;
};

/// Sizes and what goes with what; the device checks dtype and shape tensor by tensor as it takes them.
inline NormalizationSizes check_normalization(const char* op, const Tensor& x, const std::optional<Tensor>& dx,
                                              const std::optional<Tensor>& weight, const std::optional<Tensor>& dweight,
                                              const std::optional<Tensor>& bias, const std::optional<Tensor>& dbias,
                                              const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                                              int64_t outer, int64_t groups, int64_t weight_groups, bool centred,
                                              double eps) {
  check_floating(op, "x", x);
  STD_TORCH_CHECK(outer >= 0 && groups >= 0, op, ": outer and groups are ", outer, " and ", groups,
                  "; they must not be negative");
  STD_TORCH_CHECK(groups == 0 || outer <= INT64_MAX / groups, op, ": outer and groups are ", outer, " and ", groups,
                  "; their product must stay below 2^63");
  const int64_t rows = outer * groups;
  STD_TORCH_CHECK(rows == 0 ? x.numel() == 0 : x.numel() % rows == 0, op, ": x has ", x.numel(),
                  " elements, which outer x groups = ", outer, " x ", groups, " does not divide");
  const int64_t inner = rows == 0 ? 0 : x.numel() / rows;
  STD_TORCH_CHECK(weight_groups >= 1 && groups % weight_groups == 0, op, ": weight_groups is ", weight_groups,
                  "; expected a divisor of groups = ", groups);
  STD_TORCH_CHECK(dx || dweight || dbias, op, ": nothing is perturbed; give at least one of dx, dweight and dbias");
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), op, ": mean and var must be given together or not at all");
  STD_TORCH_CHECK(!mean || centred, op, ": mean is given, but centred is false");
  STD_TORCH_CHECK(!dweight || weight, op, ": dweight is given, but weight is None");
  STD_TORCH_CHECK(!dbias || bias, op, ": dbias is given, but bias is None");
  STD_TORCH_CHECK(eps >= 0, op, ": eps is ", eps, "; it must not be negative");

  const Tensor& some = weight ? *weight : bias ? *bias : x;
  const int64_t weights = weight || bias ? some.numel() : weight_groups;
  const int64_t weight_inner = weights / weight_groups;
  STD_TORCH_CHECK(weights % weight_groups == 0 && (inner == 0 || (weight_inner >= 1 && inner % weight_inner == 0)), op,
                  ": weight has ", weights, " elements, expected weight_groups = ", weight_groups,
                  " times a divisor of the ", inner, " elements of a row");
  const Tensor& moved = dx ? *dx : dweight ? *dweight : *dbias;
  STD_TORCH_CHECK(moved.dim() >= 1, op, ": a tangent has shape (), expected (k, *)");
  const int64_t k = moved.size(0);
  check_k(op, k);
  const ScalarType compute = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  std::vector<int64_t> dx_shape = shape_of(x), w_shape = weight || bias ? shape_of(some) : std::vector<int64_t>{};
  dx_shape.insert(dx_shape.begin(), k);
  std::vector<int64_t> dw_shape = w_shape;
  dw_shape.insert(dw_shape.begin(), k);
  return {inner, k, weight_inner, compute, moved.scalar_type(), dx_shape, w_shape, dw_shape};
}

}  // namespace frog
