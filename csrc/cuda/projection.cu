// Coefficients of the orthogonal projection by pivoted Cholesky; csrc/cpu/projection.cpp says what is computed and why.
#include "../arguments/projection.h"
#include "device.h"
#include "kernels/projection.cuh"

namespace frog {
namespace {

// Unlike on the CPU, an invalid Gram matrix cannot raise without waiting for the device: its rank is -1 and its
// coefficients are NaN.
std::tuple<Tensor, Tensor> cholesky_project(const Tensor& gram, const Tensor& derivatives, double rtol) {
  const char* op = "cholesky_project";
  check_same_device(op, "gram", gram, derivatives);
  check_same_device(op, "derivatives", derivatives, gram);
  check_projection(op, gram, derivatives, rtol);
  const bool batched = gram.dim() == 3;
  const int64_t b = batched ? gram.size(0) : 1, k = gram.size(-1), r = derivatives.size(-1);
  STD_TORCH_CHECK(k <= kMostProjected, op, ": k is ", k, "; accepted on a GPU are up to ", kMostProjected, " tangents");
  const OnDevice stream(gram);
  const Tensor g = as_contiguous(to_dtype(gram, ScalarType::Double));         // [b, k, k]
  const Tensor d = as_contiguous(to_dtype(derivatives, ScalarType::Double));  // [b, k, r]
  const ProjectionPlan plan = projection_plan(k, shared_memory_of_device());
  Tensor work = new_on(g, {plan.matrix_shared ? 0 : b * k * k}, ScalarType::Double);
  Tensor c = new_on(g, shape_of(derivatives), ScalarType::Double);                                        // [b, k, r]
  Tensor rank = new_on(g, batched ? std::vector<int64_t>{b} : std::vector<int64_t>{}, ScalarType::Long);  // [b]
  launch_projection(plan, in<double>(g), in<double>(d), rtol, out<double>(work), out<double>(c), out<int64_t>(rank), b,
                    k, r, stream);
  return {c, rank};
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CUDA, m) { m.impl("cholesky_project", TORCH_BOX(&cholesky_project)); }

}  // namespace
}  // namespace frog
