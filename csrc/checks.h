// Argument checks shared by every operator: each error names the operator, the argument, what was given and what is
// accepted.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
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

/// No element of `t`, which is written to, stands for several.
inline void check_written(const char* op, const char* name, const Tensor& t) {
  for (int64_t a = 0; a < t.dim(); ++a) {
    STD_TORCH_CHECK(t.size(a) <= 1 || t.stride(a) != 0 || t.numel() == 0, op, ": ", name, " has stride 0 along axis ",
                    a, " of shape ", shape_string(t), "; an expanded tensor cannot be written in place, clone() it");
  }
}

/// Whether some element of both lies at one place; for tensors with gaps or overlaps only whether they begin there.
inline bool overlap(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto bytes = [](const Tensor& t) {  // from its first element to behind its last
    int64_t elements = 1;
    for (int64_t j = 0; j < t.dim(); ++j) elements += (t.size(j) - 1) * t.stride(j);
    return std::pair<int64_t, bool>{elements * static_cast<int64_t>(t.element_size()), elements == t.numel()};
  };
  const auto [a_bytes, a_dense] = bytes(a);
  const auto [b_bytes, b_dense] = bytes(b);
  const uintptr_t from_a = reinterpret_cast<uintptr_t>(a.data_ptr()),
                  from_b = reinterpret_cast<uintptr_t>(b.data_ptr());
  if (!a_dense || !b_dense) return from_a == from_b;
  return from_a < from_b + static_cast<uintptr_t>(b_bytes) && from_b < from_a + static_cast<uintptr_t>(a_bytes);
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
