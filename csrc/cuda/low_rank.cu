// Linear combinations of tangents of low rank: two calls of the library for each matrix. Products take TF32 where
// PyTorch is told to (torch.backends.cuda.matmul), as those of layers do.
#include "../arguments/low_rank.h"
#include "device.h"

namespace frog {
namespace {

std::vector<Tensor> low_rank_combine(const Tensor& given, int64_t k, int64_t r, std::vector<int64_t> heights,
                                     std::vector<int64_t> widths, const Tensor& coefficients) {
  const char* op = "low_rank_combine";
  check_same_device(op, "factors", given, coefficients);
  check_same_device(op, "coefficients", coefficients, given);
  check_low_rank(op, given, k, r, heights, widths, coefficients);
  const OnDevice current(given);
  const int64_t rows = k * r;
  const ScalarType compute = given.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor factors = as_contiguous(to_dtype(given, compute));
  const Tensor weights = torch::stable::view(as_contiguous(to_dtype(coefficients, compute)), {k, 1});
  int64_t left_at = 0, right_at = 0;
  for (const int64_t height : heights) right_at += rows * height;
  std::vector<Tensor> results;
  results.reserve(heights.size());
  for (size_t b = 0; b < heights.size(); ++b) {
    const int64_t height = heights[b], width = widths[b];
    Tensor factor = torch::stable::narrow(factors, 0, left_at, rows * height);
    const Tensor left = multiply(torch::stable::view(factor, {k, r * height}), weights);
    factor = torch::stable::narrow(factors, 0, right_at, rows * width);
    Tensor result = new_on(given, {height, width}, compute);
    mm_out(result, torch::stable::transpose(torch::stable::view(left, {rows, height}), 0, 1),
           torch::stable::view(factor, {rows, width}));
    results.push_back(to_dtype(result, given.scalar_type()));
    left_at += rows * height, right_at += rows * width;
  }
  return results;
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CUDA, m) { m.impl("low_rank_combine", TORCH_BOX(&low_rank_combine)); }

}  // namespace
}  // namespace frog
