// Gram matrices of drawn and of given tangents; a file of its own, because its kernels take as long to compile as those
// of tangents.cu.
#include "../arguments/tangents.h"
#include "device.h"
#include "kernels/gram.cuh"

namespace frog {
namespace {

Tensor tangent_gram(const Tensor& state, int64_t k, int64_t numel, int64_t offset, int64_t first,
                    int64_t distribution) {
  const char* op = "tangent_gram";
  check_same_device(op, "state", state, state);
  check_draw(op, state, k, first, distribution);
  check_range(op, numel, offset);
  const OnDevice stream(state);
  Tensor result = new_on(state, {k, k}, ScalarType::Double);
  Tensor work = new_on(state, {distribution == kStandardBasis ? 0 : gram_workspace(k, numel)}, ScalarType::Double);
  launch_drawn_gram(in<int64_t>(state), out<double>(work), out<double>(result), k, numel, offset, first, distribution,
                    stream);
  return result;
}

Tensor gram(const Tensor& given) {
  const char* op = "gram";
  check_same_device(op, "tangents", given, given);
  check_gram(op, given);
  const int64_t k = given.size(0), n = given.size(1);
  const OnDevice stream(given);
  const Tensor tangents = n > 0 && given.stride(1) == 1 ? given : torch::stable::contiguous(given);  // [k, n]
  Tensor result = new_on(given, {k, k}, ScalarType::Double);
  Tensor work = new_on(given, {gram_workspace(k, n)}, ScalarType::Double);
  dispatch_floating(op, tangents.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    launch_gram(in<T>(tangents), out<double>(work), out<double>(result), k, n, tangents.stride(0), stream);
  });
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CUDA, m) {
  m.impl("tangent_gram", TORCH_BOX(&tangent_gram));
  m.impl("gram", TORCH_BOX(&gram));
}

}  // namespace
}  // namespace frog
