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

inline Tensor dense_as(const Tensor& t, ScalarType dtype) { return torch::stable::contiguous(to_dtype(t, dtype)); }
inline std::optional<Tensor> dense_as(const std::optional<Tensor>& t, ScalarType dtype) {
  if (!t) return std::nullopt;
  return dense_as(*t, dtype);
}

/// Element types of a kernel: double for both, or two of float, bfloat16 and float16.
struct KernelTypes {
  ScalarType primal, tangents;
};

/// The tensors' own types where there is a kernel for them. What differs within the primal or within the tangents is
/// taken as float; if anything is double, all is.
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
  const KernelTypes types{common(primal), common(tangents)};
  return any_double ? KernelTypes{ScalarType::Double, ScalarType::Double} : types;
}

/// Calls body(X{}, T{}) with the kernels' names for the element types.
template <class Body>
void dispatch_types(const char* op, const KernelTypes& types, const Body& body) {
  if (types.primal == ScalarType::Double) return body(double{}, double{});
  const auto with_primal = [&](auto primal) {
    switch (types.tangents) {
      case ScalarType::Float:
        return body(primal, float{});
      case ScalarType::BFloat16:
        return body(primal, bf16{});
      case ScalarType::Half:
        return body(primal, fp16{});
      default:
        STD_TORCH_CHECK(false, op, ": dtype ", dtype_string(types.tangents), " of tangents is not supported");
    }
  };
  switch (types.primal) {
    case ScalarType::Float:
      return with_primal(float{});
    case ScalarType::BFloat16:
      return with_primal(bf16{});
    case ScalarType::Half:
      return with_primal(fp16{});
    default:
      STD_TORCH_CHECK(false, op, ": dtype ", dtype_string(types.primal), " is not supported");
  }
}

}  // namespace frog
