// What the stable ABI of torch 2.11 lacks, in one place. Each shim names the condition under which it can go.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace frog {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace detail {
template <class T>
inline StableIValue box(const T& value) {
  return torch::stable::detail::from(value);
}
inline Tensor call_for_tensor(const char* name, const char* overload, StableIValue* stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}
}  // namespace detail

// The following aten operators have no typed wrapper in torch/csrc/stable/ops.h; drop each once it has one.

/// a (n, m) @ b (m, p) written into out (n, p).
inline void mm_out(Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{detail::box(a), detail::box(b), detail::box(out)};
  detail::call_for_tensor("aten::mm", "out", stack.data());
}

/// out (k, n, p) = a (k, n, m) @ b (k, m, p).
inline void bmm_out(Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{detail::box(a), detail::box(b), detail::box(out)};
  detail::call_for_tensor("aten::bmm", "out", stack.data());
}

/// a * b, broadcast.
inline Tensor multiply(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{detail::box(a), detail::box(b)};
  return detail::call_for_tensor("aten::mul", "Tensor", stack.data());
}

/// A view of `self`'s storage.
inline Tensor as_strided(const Tensor& self, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                         int64_t storage_offset) {
  std::array<StableIValue, 4> stack{detail::box(self), detail::box(sizes), detail::box(strides),
                                    detail::box(std::optional<int64_t>(storage_offset))};
  return detail::call_for_tensor("aten::as_strided", "", stack.data());
}

/// A convolution of any kind.
inline Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                          const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                          const std::vector<int64_t>& dilation, bool transposed,
                          const std::vector<int64_t>& output_padding, int64_t groups) {
  std::array<StableIValue, 9> stack{detail::box(input),      detail::box(weight),         detail::box(bias),
                                    detail::box(stride),     detail::box(padding),        detail::box(dilation),
                                    detail::box(transposed), detail::box(output_padding), detail::box(groups)};
  return detail::call_for_tensor("aten::convolution", "", stack.data());
}

/// A copy of `self` in another dtype.
inline Tensor to_dtype(const Tensor& self, ScalarType dtype) {
  return self.scalar_type() == dtype ? self : torch::stable::to(self, dtype);
}

/// The tensor itself where it is contiguous, without a call of the library.
inline Tensor as_contiguous(const Tensor& self) {
  return self.is_contiguous() ? self : torch::stable::contiguous(self);
}

}  // namespace frog
