// Cross entropy, squared error and binary cross entropy and their tangents; csrc/cpu/losses.cpp is its twin.
//
// Unlike on the CPU, a target that is no class and an input that is no probability cannot raise without waiting for the
// device: their losses and derivatives are NaN.
#include "kernels/losses.cuh"

#include "../arguments/losses.h"
#include "dual.h"

namespace frog {
namespace {

std::tuple<Tensor, Tensor> cross_entropy_jvp(const Tensor& logits, const Tensor& dlogits, const Tensor& target,
                                             const std::optional<Tensor>& weight, int64_t ignore_index,
                                             double label_smoothing, int64_t reduction) {
  const char* op = "cross_entropy_jvp";
  check_logits(op, logits);
  check_tangents_on_device(op, "dlogits", dlogits, logits);
  const int64_t rows = logits.size(0), classes = logits.size(1), k = dlogits.size(0);
  check_same_device(op, "target", target, logits);
  check_classes(op, target, rows, label_smoothing);
  check_reduction(op, reduction);
  if (weight) {
    check_same_device(op, "weight", *weight, logits);
    check_class_weight(op, *weight, logits);
  }
  const OnDevice stream(logits);
  const KernelTypes types = kernel_types({&logits}, {&dlogits});
  const ScalarType compute = types.primal == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor x = dense_as(logits, types.primal), dx = dense_as(dlogits, types.tangents);
  const Tensor t = as_contiguous(target);
  const std::optional<Tensor> w = dense_as(weight, compute);
  Tensor loss = new_on(logits, {rows}, types.primal), dloss = new_on(logits, {k, rows}, types.tangents);
  const bool each = reduction == kNoReduction;
  Tensor value = each ? loss : new_on(logits, {}, types.primal);
  Tensor derivatives = each ? dloss : new_on(logits, {k}, types.tangents);
  dispatch_types(op, types, [&](auto primal, auto tangent) {
    using X = decltype(primal);
    using T = decltype(tangent);
    using C = typename Compute<X>::type;
    launch_cross_entropy(in<X>(x), in<T>(dx), in<int64_t>(t), in<C>(w), out<X>(loss), out<T>(dloss), rows, classes, k,
                         ignore_index, label_smoothing, stream);
    if (each) return;
    launch_reduce_losses(in<X>(loss), in<T>(dloss), in<int64_t>(t), in<C>(w), out<X>(value), out<T>(derivatives), rows,
                         classes, k, ignore_index, reduction == kMean, stream);
  });
  return {to_dtype(value, logits.scalar_type()), to_dtype(derivatives, dlogits.scalar_type())};
}

std::tuple<Tensor, Tensor> mse_jvp(const Tensor& input, const std::optional<Tensor>& dinput, const Tensor& target,
                                   const std::optional<Tensor>& dtarget) {
  const char* op = "mse_jvp";
  check_floating(op, "input", input);
  check_same_device(op, "target", target, input);
  check_target(op, target, input);
  STD_TORCH_CHECK(dinput || dtarget, op, ": dinput and dtarget are both None; at least one must be given");
  if (dinput) check_tangents_on_device(op, "dinput", *dinput, input);
  if (dtarget) check_tangents_on_device(op, "dtarget", *dtarget, target);
  if (dinput && dtarget) check_shape(op, "dtarget", *dtarget, shape_of(*dinput));
  const OnDevice stream(input);
  const Tensor& given = dinput ? *dinput : *dtarget;
  const int64_t k = given.size(0);
  const KernelTypes types = kernel_types({&input}, {pointer_to(dinput), pointer_to(dtarget)});
  const Tensor x = dense_as(input, types.primal), t = dense_as(target, types.primal);
  const std::optional<Tensor> dx = dense_as(dinput, types.tangents), dt = dense_as(dtarget, types.tangents);
  Tensor loss = new_on(input, shape_of(input), types.primal);
  Tensor dloss = new_on(input, tangent_shape(input, k), types.tangents);
  dispatch_types(op, types, [&](auto primal, auto tangent) {
    using X = decltype(primal);
    using T = decltype(tangent);
    launch_mse(in<X>(x), in<X>(t), in<T>(dx), in<T>(dt), out<X>(loss), out<T>(dloss), input.numel(), k, stream);
  });
  return {to_dtype(loss, input.scalar_type()), to_dtype(dloss, given.scalar_type())};
}

std::tuple<Tensor, Tensor> bce_jvp(const Tensor& input, const Tensor& dinput, const Tensor& target,
                                   const std::optional<Tensor>& weight, const std::optional<Tensor>& pos_weight,
                                   bool with_logits) {
  const char* op = "bce_jvp";
  check_floating(op, "input", input);
  check_same_device(op, "target", target, input);
  check_target(op, target, input);
  STD_TORCH_CHECK(with_logits || !pos_weight, op, ": pos_weight is given; it is accepted only with_logits");
  check_tangents_on_device(op, "dinput", dinput, input);
  if (weight) check_same_device(op, "weight", *weight, input);
  if (pos_weight) check_same_device(op, "pos_weight", *pos_weight, input);
  const OnDevice stream(input);
  const int64_t k = dinput.size(0);
  const KernelTypes types = kernel_types({&input}, {&dinput});
  const Tensor x = dense_as(input, types.primal), t = dense_as(target, types.primal);
  const Tensor dx = dense_as(dinput, types.tangents);
  std::optional<Tensor> w, q;
  if (weight) w = dense_as(broadcast(op, "weight", *weight, input), types.primal);
  if (pos_weight) q = dense_as(broadcast(op, "pos_weight", *pos_weight, input), types.primal);
  Tensor loss = new_on(input, shape_of(input), types.primal);
  Tensor dloss = new_on(input, tangent_shape(input, k), types.tangents);
  dispatch_types(op, types, [&](auto primal, auto tangent) {
    using X = decltype(primal);
    using T = decltype(tangent);
    launch_bce(in<X>(x), in<X>(t), in<X>(w), in<X>(q), in<T>(dx), out<X>(loss), out<T>(dloss), input.numel(), k,
               with_logits, stream);
  });
  return {to_dtype(loss, input.scalar_type()), to_dtype(dloss, dinput.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CUDA, m) {
  m.impl("cross_entropy_jvp", TORCH_BOX(&cross_entropy_jvp));
  m.impl("mse_jvp", TORCH_BOX(&mse_jvp));
  m.impl("bce_jvp", TORCH_BOX(&bce_jvp));
}

}  // namespace
}  // namespace frog
