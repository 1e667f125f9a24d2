// Argument checks shared by every operator: each error names the operator, the argument, what was given and what is
// accepted.
#pragma once

#include <string>
#include <vector>

#include "stable_compat.h"

namespace frog {

inline std::string shape_string(const int64_t* sizes, size_t count) {
  std::string text = "(";
  for (size_t j = 0; j < count; ++j) text += (j ? ", " : "") + std::to_string(sizes[j]);
  return text + (count == 1 ? ",)" : ")");
}
inline std::string shape_string(const std::vector<int64_t>& sizes) { return shape_string(sizes.data(), sizes.size()); }
inline std::string shape_string(const Tensor& t) { return shape_string(t.sizes().data(), t.sizes().size()); }
inline std::vector<int64_t> shape_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

inline std::string dtype_string(ScalarType type) { return torch::headeronly::toString(type); }

inline void check_floating(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(is_floating(t.scalar_type()), op, ": ", name, " has dtype ", dtype_string(t.scalar_type()),
                  "; accepted are float32, float64, bfloat16 and float16");
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType expected) {
  STD_TORCH_CHECK(t.scalar_type() == expected, op, ": ", name, " has dtype ", dtype_string(t.scalar_type()),
                  ", expected ", dtype_string(expected));
}

inline void check_shape(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& expected) {
  STD_TORCH_CHECK(shape_of(t) == expected, op, ": ", name, " has shape ", shape_string(t), ", expected ",
                  shape_string(expected));
}

inline void check_cpu(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " is not on the CPU, but another argument is; all must be on one device");
}

inline void check_k(const char* op, int64_t k) {
  STD_TORCH_CHECK(k >= 1, op, ": k is ", k, "; at least 1 tangent is needed");
}

/// Tangents are (k, *primal.shape).
inline void check_tangents(const char* op, const char* name, const Tensor& tangents, const Tensor& primal) {
  std::vector<int64_t> expected = shape_of(primal);
  expected.insert(expected.begin(), tangents.dim() > 0 ? tangents.size(0) : 1);
  check_shape(op, name, tangents, expected);
  check_k(op, tangents.size(0));
}

/// Tangents (k, *s), `s` a suffix of `shape`.
inline void check_repeated(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& shape,
                           int64_t k) {
  check_floating(op, name, t);
  const int64_t d = t.dim() - 1, dim = static_cast<int64_t>(shape.size());
  bool fits = d >= 0 && d <= dim && t.size(0) == k;
  for (int64_t j = 1; fits && j <= d; ++j) fits = t.size(-j) == shape[dim - j];
  STD_TORCH_CHECK(fits, op, ": ", name, " has shape ", shape_string(t), ", expected (k, *s) with k = ", k,
                  " and s a suffix of ", shape_string(shape));
}

}  // namespace frog
