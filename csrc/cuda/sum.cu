// tangent_sum: a + va + alpha (b + vb); csrc/cpu/sum.cpp is its twin.
#include "kernels/sum.cuh"

#include "../arguments/sum.h"
#include "dual.h"

namespace frog {
namespace {

constexpr const char* kOp = "tangent_sum";

Tensor tangent_sum(const Tensor& a, const std::optional<Tensor>& va, const std::optional<Tensor>& b,
                   const std::optional<Tensor>& vb, double alpha) {
  check_same_device(kOp, "a", a, a);
  if (va) check_same_device(kOp, "va", *va, a);
  if (b) check_same_device(kOp, "b", *b, a);
  if (vb) check_same_device(kOp, "vb", *vb, a);
  check_sum(kOp, a, va, b, vb);
  const OnDevice stream(a);
  const int64_t k = a.size(0);
  const ScalarType type = kernel_types({}, {&a, pointer_to(va), pointer_to(b), pointer_to(vb)}).tangents;
  const Tensor a_ = dense_as(a, type);  // [k, numel]
  const std::optional<Tensor> va_ = dense_as(va, type), b_ = dense_as(b, type), vb_ = dense_as(vb, type);
  const auto period = [&](const std::optional<Tensor>& t) { return t ? std::max<int64_t>(1, t->numel() / k) : 1; };
  Tensor out = new_on(a, shape_of(a), type);
  dispatch_floating(kOp, type, [&](auto zero) {
    using T = decltype(zero);
    launch_sum(in<T>(a_), in<T>(va_), period(va), in<T>(b_), in<T>(vb_), period(vb), alpha, frog::out<T>(out),
               a.numel() / k, k, stream);
  });
  return to_dtype(out, a.scalar_type());
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CUDA, m) { m.impl("tangent_sum", TORCH_BOX(&tangent_sum)); }

}  // namespace
}  // namespace frog
