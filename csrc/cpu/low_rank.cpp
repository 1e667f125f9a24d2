// Linear combinations of tangents of low rank, which are never multiplied out one by one.
#include "../arguments/low_rank.h"
#include "blocks.h"
#include "product.h"

namespace frog {
namespace {

// result [height, width] = left^T right, rows of left [rows, height] times weights [rows]
template <class T>
void combine(const Tensor& factors, int64_t left_at, int64_t right_at, const std::vector<T>& weights, Tensor& result) {
  const int64_t rows = static_cast<int64_t>(weights.size()), height = result.size(0), width = result.size(1);
  const T* data = static_cast<const T*>(factors.const_data_ptr());
  const T *left = data + left_at, *right = data + right_at;
  if (rows <= kFewRows && has_tile<T>()) {
    outer_product(left, right, rows, height, width, static_cast<T*>(result.mutable_data_ptr()), weights.data());
    return;
  }
  const Tensor scaled = new_tensor(factors, {rows, height}, factors.scalar_type());
  T* to = static_cast<T*>(scaled.mutable_data_ptr());
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t o = 0; o < height; ++o) to[i * height + o] = weights[i] * left[i * height + o];
  }
  mm_out(result, torch::stable::transpose(scaled, 0, 1), part_of(factors, right_at, {rows, width}));
}

std::vector<Tensor> low_rank_combine(const Tensor& factors_, int64_t k, int64_t r, std::vector<int64_t> heights,
                                     std::vector<int64_t> widths, const Tensor& coefficients) {
  const char* op = "low_rank_combine";
  check_cpu(op, "factors", factors_);
  check_low_rank(op, factors_, k, r, heights, widths, coefficients);
  const int64_t rows = k * r;
  std::vector<Tensor> results;
  results.reserve(heights.size());
  dispatch_floating(op, factors_.scalar_type(), [&](auto zero) {
    using C = typename ComputeOf<decltype(zero)>::type;
    const ScalarType compute = std::is_same_v<C, double> ? ScalarType::Double : ScalarType::Float;
    const Tensor factors = as_contiguous(to_dtype(factors_, compute));
    const std::vector<C> each = read_coefficients<C>(op, coefficients, 1.0);
    std::vector<C> weights(rows);
    for (int64_t i = 0; i < rows; ++i) weights[i] = each[i / r];
    int64_t left = 0, right = 0;
    for (const int64_t height : heights) right += rows * height;
    for (size_t b = 0; b < heights.size(); left += rows * heights[b], right += rows * widths[b++]) {
      Tensor result = new_tensor(factors, {heights[b], widths[b]}, compute);
      if (result.numel() > 0) combine(factors, left, right, weights, result);
      results.push_back(to_dtype(result, factors_.scalar_type()));
    }
  });
  return results;
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CPU, m) { m.impl("low_rank_combine", TORCH_BOX(&low_rank_combine)); }

}  // namespace
}  // namespace frog
