// Arguments of linear_jvp, linear_rows and linear_gradient, checked alike on every device.
#pragma once

#include "pointwise.h"
#include "tangents.h"

namespace frog {

/// What linear_jvp is given; tensors as they came.
struct LinearArguments {
  const Tensor& x;
  const std::optional<Tensor>& dx;
  const Tensor& weight;
  const std::optional<Tensor>&bias, &dweight, &dbias, &activity, &state;
  int64_t k, first, distribution;
  std::optional<int64_t> weight_offset, bias_offset;
  int64_t activation;
  double alpha, beta;
  const std::optional<Tensor>&left, &right;

  bool sampled() const { return weight_offset || bias_offset; }

  /// Calls body(name, tensor) for all that are given.
  template <class Body>
  void for_each(const Body& body) const {
    body("x", x);
    body("weight", weight);
    const std::pair<const char*, const std::optional<Tensor>&> others[] = {
        {"dx", dx},       {"bias", bias}, {"dweight", dweight}, {"dbias", dbias}, {"activity", activity},
        {"state", state}, {"left", left}, {"right", right}};
    for (const auto& [name, tensor] : others) {
      if (tensor) body(name, *tensor);
    }
  }
};

/// x [rows, in] and so on; period: rows of the activity tangent before it repeats.
struct LinearSizes {
  int64_t rows, in, out, period;
  std::vector<int64_t> y_shape, dy_shape;
};

inline LinearSizes check_linear(const char* op, const LinearArguments& a) {
  const int64_t k = a.k;
  const Tensor &x = a.x, &weight = a.weight;
  check_k(op, k);
  check_floating(op, "x", x);
  STD_TORCH_CHECK(weight.dim() == 2, op, ": weight has shape ", shape_string(weight), ", expected (out, in)");
  LinearSizes s{1, weight.size(1), weight.size(0), 1, shape_of(x), {}};
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) == s.in, op, ": x has shape ", shape_string(x), ", expected (*, ", s.in,
                  ")");
  check_dtype(op, "weight", weight, x.scalar_type());
  STD_TORCH_CHECK(!(a.dweight && a.weight_offset), op,
                  ": dweight and weight_offset are both given; accepted is one of them");
  STD_TORCH_CHECK(a.left.has_value() == a.right.has_value(), op, ": ", a.left ? "right" : "left",
                  " is None; accepted are both factors of the weight's tangents, or none");
  STD_TORCH_CHECK(!a.left || !(a.dweight || a.weight_offset), op, ": left is given, and so is ",
                  a.dweight ? "dweight" : "weight_offset", "; accepted is one of them");
  STD_TORCH_CHECK(!(a.dbias && a.bias_offset), op, ": dbias and bias_offset are both given; accepted is one of them");
  STD_TORCH_CHECK(
      a.dx || a.dweight || a.dbias || a.activity || a.sampled() || a.left, op,
      ": nothing is perturbed; give at least one of dx, dweight, dbias, activity, weight_offset, bias_offset, left");
  STD_TORCH_CHECK(a.activation >= 0 && a.activation <= 10, op, ": activation is ", a.activation,
                  "; accepted are 0 to 10");
  check_function(op, a.activation, a.alpha, a.beta);
  STD_TORCH_CHECK(!a.sampled() || a.state, op, ": state is None, but sampled tangents need [seed, step]");

  std::vector<int64_t> dx_shape = s.y_shape;
  dx_shape.insert(dx_shape.begin(), k);
  s.y_shape.back() = s.out;
  s.dy_shape = dx_shape;
  s.dy_shape.back() = s.out;
  for (size_t j = 0; j + 1 < s.y_shape.size(); ++j) s.rows *= s.y_shape[j];

  const auto check = [&](const char* name, const std::optional<Tensor>& t, const std::vector<int64_t>& expected) {
    if (!t) return;
    check_floating(op, name, *t);
    check_shape(op, name, *t, expected);
  };
  if (a.bias) check_dtype(op, "bias", *a.bias, x.scalar_type());
  check("dx", a.dx, dx_shape);
  check("bias", a.bias, {s.out});
  check("dweight", a.dweight, {k, s.out, s.in});
  check("dbias", a.dbias, {k, s.out});
  if (a.left) {
    STD_TORCH_CHECK(a.left->dim() == 3 && a.left->size(1) >= 1, op, ": left has shape ", shape_string(*a.left),
                    ", expected (k, r, out) with r >= 1");
    check("left", a.left, {k, a.left->size(1), s.out});
    check("right", a.right, {k, a.left->size(1), s.in});
  }
  if (a.activity) {
    const Tensor& v = *a.activity;
    check_floating(op, "activity", v);
    const int64_t d = v.dim();
    bool fits = d >= 2 && d <= static_cast<int64_t>(s.dy_shape.size()) && v.size(0) == k;
    for (int64_t j = 1; fits && j < d; ++j) fits = v.size(-j) == s.y_shape[s.y_shape.size() - j];
    STD_TORCH_CHECK(fits, op, ": activity has shape ", shape_string(v), ", expected (k, *s, out) with s a suffix of ",
                    shape_string(s.y_shape.data(), s.y_shape.size() - 1), ", k = ", k, " and out = ", s.out);
    for (int64_t j = 1; j + 1 < d; ++j) s.period *= v.size(j);
  }
  if (a.sampled()) {
    check_draw(op, *a.state, k, a.first, a.distribution);
    if (a.weight_offset) check_range(op, s.out * s.in, *a.weight_offset, "weight_offset");
    if (a.bias_offset) check_range(op, s.out, *a.bias_offset, "bias_offset");
  }
  return s;
}

inline void check_linear_rows(const char* op, const Tensor& x, const Tensor& weight) {
  check_floating(op, "x", x);
  check_dtype(op, "weight", weight, x.scalar_type());
  STD_TORCH_CHECK(weight.dim() == 2, op, ": weight has shape ", shape_string(weight), ", expected (out, in)");
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) == weight.size(1), op, ": x has shape ", shape_string(x),
                  ", expected (*, ", weight.size(1), ")");
}

inline void check_linear_gradient(const char* op, const Tensor& gradient, const Tensor& x) {
  const Tensor* given[2] = {&gradient, &x};
  const char* names[2] = {"gradient", "x"};
  for (int j = 0; j < 2; ++j) {
    check_floating(op, names[j], *given[j]);
    check_dtype(op, names[j], *given[j], gradient.scalar_type());
    STD_TORCH_CHECK(given[j]->dim() == 2 && given[j]->size(0) == gradient.size(0), op, ": ", names[j], " has shape ",
                    shape_string(*given[j]), ", expected (rows, features) with the same number of rows");
  }
}

}  // namespace frog
