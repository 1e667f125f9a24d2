// Operators of a primal and its k tangents: checks, and the pairs of types that kernels exist for.
#pragma once

#include "device.h"

namespace frog {

inline const Tensor* pointer_to(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

/// `tangents` has the shape (k, *primal.shape), a floating dtype and the device of the primal.
inline void check_tangents_on_device(const char* op, const char* name, const Tensor& tangents, const Tensor& primal) {
  check_same_device(op, name, tangents, primal);
  check_floating(op, name, tangents);
  check_tangents(op, name, tangents, primal);
}

inline std::vector<int64_t> tangent_shape(const Tensor& primal, int64_t k) {
  std::vector<int64_t> shape = shape_of(primal);
  shape.insert(shape.begin(), k);
  return shape;
}

inline Tensor dense_as(const Tensor& t, ScalarType dtype) { return as_contiguous(to_dtype(t, dtype)); }
inline std::optional<Tensor> dense_as(const std::optional<Tensor>& t, ScalarType dtype) {
  if (!t) return std::nullopt;
  return dense_as(*t, dtype);
}

/// Element types of a kernel: double for both, else float or one of bfloat16 and float16 for each, never both of them.
struct KernelTypes {
  ScalarType primal, tangents;
};

/// The tensors' own types where there is a kernel for them. What differs within the primal or within the tangents is
/// taken as float; if anything is double, all is. Either list may be empty.
inline KernelTypes kernel_types(std::initializer_list<const Tensor*> primal,
                                std::initializer_list<const Tensor*> tangents) {
  bool any_double = false;
  const auto common = [&](std::initializer_list<const Tensor*> tensors) {
    ScalarType type = ScalarType::Undefined;
    for (const Tensor* t : tensors) {
      if (t == nullptr) continue;
      any_double = any_double || t->scalar_type() == ScalarType::Double;
      type = type == ScalarType::Undefined || type == t->scalar_type() ? t->scalar_type() : ScalarType::Float;
    }
    return type;
  };
  KernelTypes types{common(primal), common(tangents)};
  if (any_double) return {ScalarType::Double, ScalarType::Double};
  const bool low = types.primal == ScalarType::BFloat16 || types.primal == ScalarType::Half;
  if (low && types.tangents != types.primal) types.tangents = ScalarType::Float;
  return types;
}

/// Calls body(X{}, T{}) with the kernels' names for the element types.
template <class Body>
void dispatch_types(const char* op, const KernelTypes& types, const Body& body) {
  const bool wide = types.tangents == ScalarType::Float;
  switch (types.primal) {
    case ScalarType::Double:
      return body(double{}, double{});
    case ScalarType::Float:
      if (wide) return body(float{}, float{});
      return types.tangents == ScalarType::BFloat16 ? body(float{}, bf16{}) : body(float{}, fp16{});
    case ScalarType::BFloat16:
      return wide ? body(bf16{}, float{}) : body(bf16{}, bf16{});
    case ScalarType::Half:
      return wide ? body(fp16{}, float{}) : body(fp16{}, fp16{});
    default:
      STD_TORCH_CHECK(false, op, ": dtype ", dtype_string(types.primal),
                      " is not supported; accepted are float32, float64, bfloat16 and float16");
  }
}

}  // namespace frog
