// Drawing tangents and their linear combinations; nothing of size k x n is stored unless it is the result.
//
// `state` is read by the kernels, on the device: a CUDA graph whose state advances between replays draws anew, and what
// state holds cannot be refused as on the CPU. A step outside [0, 2^32) makes the whole result NaN, a negative
// coordinate of a standard basis its tangent, that tangent's row and column of the Gram matrix, and every linear
// combination.
#include "kernels/combine_samples.cuh"

#include "../arguments/tangents.h"
#include "device.h"

namespace frog {
namespace {

Tensor sample_tangents(const Tensor& state, int64_t k, int64_t numel, int64_t offset, int64_t first,
                       int64_t distribution, ScalarType dtype) {
  const char* op = "sample_tangents";
  check_same_device(op, "state", state, state);
  check_draw(op, state, k, first, distribution);
  check_range(op, numel, offset);
  check_drawn_dtype(op, dtype);
  const OnDevice stream(state);
  Tensor drawn = new_on(state, {k, numel}, dtype);  // [k, numel]
  dispatch_floating(op, dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_sample(in<int64_t>(state), out<T>(drawn), k, numel, offset, first, distribution, stream);
  });
  return drawn;
}

Tensor sample_blocks(const Tensor& state, int64_t k, std::vector<int64_t> numels, std::vector<int64_t> offsets,
                     int64_t first, int64_t distribution, ScalarType dtype) {
  const char* op = "sample_blocks";
  check_same_device(op, "state", state, state);
  check_draw(op, state, k, first, distribution);
  const int64_t total = check_ranges(op, k, numels, offsets);
  check_drawn_dtype(op, dtype);
  const OnDevice stream(state);
  Tensor drawn = new_on(state, {total}, dtype);  // of each block [k, numel]
  dispatch_floating(op, dtype, [&](auto zero) {
    using T = decltype(zero);
    T* block = out<T>(drawn);
    for (size_t b = 0; b < numels.size(); block += k * numels[b++]) {
      launch_sample(in<int64_t>(state), block, k, numels[b], offsets[b], first, distribution, stream);
    }
  });
  return drawn;
}

// result [numel] (+)= alpha V c. The coefficients are read in float64, as the CPU operators do; cholesky_project's are.
void combine(const char* op, const Tensor& state, const Tensor& coefficients, Tensor& result, int64_t offset,
             int64_t first, int64_t distribution, bool add, double alpha) {
  const OnDevice stream(state);
  const Tensor c = as_contiguous(to_dtype(coefficients, ScalarType::Double));  // [k]
  dispatch_floating(op, result.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    launch_combine(in<int64_t>(state), in<double>(c), out<T>(result), c.size(0), result.numel(), offset, first,
                   distribution, add, alpha, stream);
  });
}

Tensor tangent_combine(const Tensor& state, const Tensor& coefficients, int64_t numel, int64_t offset, int64_t first,
                       int64_t distribution, ScalarType dtype) {
  const char* op = "tangent_combine";
  check_same_device(op, "state", state, coefficients);
  check_same_device(op, "coefficients", coefficients, state);
  check_drawn_dtype(op, dtype);
  check_range(op, numel, offset);
  check_coefficients(op, coefficients);
  check_draw(op, state, coefficients.size(0), first, distribution);
  const OnDevice current(state);
  Tensor result = new_on(state, {numel}, dtype);  // [numel]
  combine(op, state, coefficients, result, offset, first, distribution, false, 1.0);
  return result;
}

Tensor tangent_combine_samples(const Tensor& state, const Tensor& coefficients, int64_t numel, int64_t offset,
                               int64_t first, int64_t distribution, ScalarType dtype) {
  const char* op = "tangent_combine_samples";
  check_same_device(op, "state", state, coefficients);
  check_same_device(op, "coefficients", coefficients, state);
  check_drawn_dtype(op, dtype);
  check_samples(op, coefficients, numel, offset);
  const int64_t k = coefficients.size(0), batch = coefficients.size(1);
  check_draw(op, state, k, first, distribution);
  STD_TORCH_CHECK(batch < int64_t{1} << 31, op, ": coefficients has ", batch,
                  " samples; fewer than 2^31 are accepted on a GPU");
  const OnDevice stream(state);
  const ScalarType compute = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor c = as_contiguous(to_dtype(coefficients, compute));  // [k, B]
  Tensor result = new_on(state, {batch, numel}, dtype);             // [B, numel]
  dispatch_floating(op, dtype, [&](auto zero) {
    using T = decltype(zero);
    using C = typename Compute<T>::type;
    launch_combine_samples(in<int64_t>(state), Samples<C>{in<C>(c), k, batch, numel}, out<T>(result), offset, first,
                           distribution, stream);
  });
  return result;
}

// A product of the library for each block, in TF32 where PyTorch is told to take it.
std::vector<Tensor> combine_blocks(const Tensor& given, int64_t k, std::vector<int64_t> numels,
                                   const Tensor& coefficients) {
  const char* op = "combine_blocks";
  check_same_device(op, "blocks", given, coefficients);
  check_same_device(op, "coefficients", coefficients, given);
  check_combine_blocks(op, given, k, numels, coefficients);
  const OnDevice current(given);
  const ScalarType compute = given.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor blocks = as_contiguous(to_dtype(given, compute));
  const Tensor c = torch::stable::view(as_contiguous(to_dtype(coefficients, compute)), {1, k});
  std::vector<Tensor> results;
  results.reserve(numels.size());
  int64_t at = 0;
  for (const int64_t numel : numels) {
    Tensor sum = new_on(given, {1, numel}, compute);
    mm_out(sum, c, torch::stable::view(torch::stable::narrow(blocks, 0, at, k * numel), {k, numel}));
    results.push_back(to_dtype(torch::stable::view(sum, {numel}), given.scalar_type()));
    at += k * numel;
  }
  return results;
}

void tangent_axpy_(Tensor& self, const Tensor& state, const Tensor& coefficients, double alpha, int64_t offset,
                   int64_t first, int64_t distribution) {
  const char* op = "tangent_axpy_";
  check_same_device(op, "self", self, state);
  check_same_device(op, "state", state, self);
  check_same_device(op, "coefficients", coefficients, self);
  check_floating(op, "self", self);
  check_written(op, "self", self);
  check_range(op, self.numel(), offset);
  check_coefficients(op, coefficients);
  check_draw(op, state, coefficients.size(0), first, distribution);
  const OnDevice current(self);
  Tensor target = as_contiguous(self);  // self itself where it is contiguous
  combine(op, state, coefficients, target, offset, first, distribution, true, alpha);
  if (target.data_ptr() != self.data_ptr()) torch::stable::copy_(self, target);
}

void tangent_sgd_(Tensor& self, std::optional<Tensor> buffer, const Tensor& state, const Tensor& coefficients,
                  double lr, double momentum, double dampening, double weight_decay, bool nesterov, bool fresh,
                  int64_t offset, int64_t first, int64_t distribution) {
  const char* op = "tangent_sgd_";
  const Sgd step{lr, momentum, dampening, weight_decay, nesterov, fresh};
  check_same_device(op, "self", self, state);
  check_same_device(op, "state", state, self);
  check_same_device(op, "coefficients", coefficients, self);
  if (buffer) check_same_device(op, "buffer", *buffer, self);
  check_sgd(op, self, buffer, step);
  check_range(op, self.numel(), offset);
  check_coefficients(op, coefficients);
  check_draw(op, state, coefficients.size(0), first, distribution);
  const OnDevice stream(self);
  const Tensor c = as_contiguous(to_dtype(coefficients, ScalarType::Double));  // [k]
  Tensor target = as_contiguous(self);
  std::optional<Tensor> moved;
  if (buffer) moved = as_contiguous(*buffer);
  dispatch_floating(op, self.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using C = typename Compute<T>::type;
    const SgdRow<T> row(out<T>(target), moved ? out<T>(*moved) : nullptr, target.numel(), offset,
                        {static_cast<C>(lr), static_cast<C>(momentum), static_cast<C>(1 - dampening),
                         static_cast<C>(weight_decay), nesterov, fresh});
    launch_sgd(in<int64_t>(state), in<double>(c), row, c.size(0), offset, first, distribution, stream);
  });
  if (target.data_ptr() != self.data_ptr()) torch::stable::copy_(self, target);
  if (buffer && moved->data_ptr() != buffer->data_ptr()) torch::stable::copy_(*buffer, *moved);
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CUDA, m) {
  m.impl("sample_tangents", TORCH_BOX(&sample_tangents));
  m.impl("sample_blocks", TORCH_BOX(&sample_blocks));
  m.impl("combine_blocks", TORCH_BOX(&combine_blocks));
  m.impl("tangent_combine", TORCH_BOX(&tangent_combine));
  m.impl("tangent_combine_samples", TORCH_BOX(&tangent_combine_samples));
  m.impl("tangent_axpy_", TORCH_BOX(&tangent_axpy_));
  m.impl("tangent_sgd_", TORCH_BOX(&tangent_sgd_));
}

}  // namespace
}  // namespace frog
