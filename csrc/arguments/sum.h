// Arguments of tangent_sum, checked alike on every device.
#pragma once

#include "../checks.h"

namespace frog {

/// a, b (k, *s); returns s.
inline std::vector<int64_t> check_sum(const char* op, const Tensor& a, const std::optional<Tensor>& va,
                                      const std::optional<Tensor>& b, const std::optional<Tensor>& vb) {
  check_floating(op, "a", a);
  STD_TORCH_CHECK(a.dim() >= 1, op, ": a has shape (), expected (k, *)");
  const int64_t k = a.size(0);
  check_k(op, k);
  const std::vector<int64_t> whole = shape_of(a), shape(whole.begin() + 1, whole.end());
  if (b) {
    check_floating(op, "b", *b);
    check_shape(op, "b", *b, whole);
  }
  if (va) check_repeated(op, "va", *va, shape, k);
  if (vb) check_repeated(op, "vb", *vb, shape, k);
  return shape;
}

}  // namespace frog
