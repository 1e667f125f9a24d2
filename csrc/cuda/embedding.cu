// embedding_jvp: rows of a table and of k tangents of it; csrc/cpu/embedding.cpp is its twin.
//
// Unlike on the CPU, an index that is no row cannot raise without waiting for the device: its value and tangents are
// NaN.
#include "kernels/embedding.cuh"

#include "../arguments/embedding.h"
#include "dual.h"

namespace frog {
namespace {

constexpr const char* kOp = "embedding_jvp";

std::tuple<Tensor, Tensor> embedding_jvp(const Tensor& indices, const Tensor& weight,
                                         const std::optional<Tensor>& dweight, const std::optional<Tensor>& state,
                                         int64_t k, int64_t first, int64_t distribution,
                                         std::optional<int64_t> weight_offset, std::optional<ScalarType> dtype) {
  const EmbeddingArguments given{indices, weight, dweight, state, k, first, distribution, weight_offset, dtype};
  given.for_each([&](const char* name, const Tensor& t) { check_same_device(kOp, name, t, weight); });
  const EmbeddingSizes s = check_embedding(kOp, given);
  const OnDevice stream(weight);
  const Tensor places = dense_as(indices, ScalarType::Long);
  Tensor y = new_on(weight, s.y_shape, weight.scalar_type()), dy = new_on(weight, s.dy_shape, s.tangents);
  const auto look_up = [&](const Tensor& tables, int64_t count, Tensor& result) {
    const Tensor dense = as_contiguous(tables);  // [count, rows, dim]
    dispatch_floating(kOp, dense.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      launch_look_up(in<T>(dense), in<int64_t>(places), out<T>(result), count, s.rows, s.dim, s.places, stream);
    });
  };
  look_up(weight, 1, y);
  if (dweight) {
    look_up(*dweight, k, dy);
    return {y, dy};
  }
  dispatch_floating(kOp, s.tangents, [&](auto zero) {
    using T = decltype(zero);
    launch_draw_rows(in<int64_t>(*state), in<int64_t>(places), out<T>(dy), k, s.rows, s.dim, s.places, *weight_offset,
                     first, distribution, stream);
  });
  return {y, dy};
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CUDA, m) { m.impl("embedding_jvp", TORCH_BOX(&embedding_jvp)); }

}  // namespace
}  // namespace frog
