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
  const Tensor tangents = n > 0 && given.stride(1) == 1 ? given : as_contiguous(given);  // [k, n]
  Tensor result = new_on(given, {k, k}, ScalarType::Double);
  Tensor work = new_on(given, {gram_workspace(k, n)}, ScalarType::Double);
  dispatch_floating(op, tangents.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    launch_gram(in<T>(tangents), out<double>(work), out<double>(result), k, n, tangents.stride(0), stream);
  });
  return result;
}

Tensor gram_blocks(const Tensor& given, int64_t k, std::vector<int64_t> numels) {
  const char* op = "gram_blocks";
  check_same_device(op, "blocks", given, given);
  check_gram_blocks(op, given, k, numels);
  const OnDevice stream(given);
  const Tensor blocks = as_contiguous(given);
  const int64_t count = static_cast<int64_t>(numels.size());
  int64_t most = 0;
  for (const int64_t numel : numels) most = std::max(most, gram_workspace(k, numel));
  Tensor result = new_on(given, {count, k, k}, ScalarType::Double);
  Tensor work = new_on(given, {most}, ScalarType::Double);  // of one block after the other
  dispatch_floating(op, blocks.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* block = in<T>(blocks);
    double* gram = out<double>(result);
    for (int64_t b = 0; b < count; block += k * numels[b++], gram += k * k) {
      launch_gram(block, out<double>(work), gram, k, numels[b], numels[b], stream);
    }
  });
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CUDA, m) {
  m.impl("tangent_gram", TORCH_BOX(&tangent_gram));
  m.impl("gram", TORCH_BOX(&gram));
  m.impl("gram_blocks", TORCH_BOX(&gram_blocks));
}

}  // namespace
}  // namespace frog
