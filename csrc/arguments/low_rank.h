// Arguments of low_rank_combine, checked alike on every device.
#pragma once

#include "tangents.h"

namespace frog {

/// Factors of matrices [heights[b], widths[b]]: of all of them the left ones [k r, height], then the right ones
/// [k r, width].
inline void check_low_rank(const char* op, const Tensor& factors, int64_t k, int64_t r,
                           const std::vector<int64_t>& heights, const std::vector<int64_t>& widths,
                           const Tensor& coefficients) {
  check_floating(op, "factors", factors);
  check_coefficients(op, coefficients);
  check_k(op, k);
  STD_TORCH_CHECK(coefficients.size(0) == k, op, ": coefficients has ", coefficients.size(0), " elements, expected ",
                  k);
  STD_TORCH_CHECK(r >= 1 && r <= INT64_MAX / k, op, ": r is ", r, "; expected at least 1, and k r below 2^63");
  STD_TORCH_CHECK(heights.size() == widths.size(), op, ": widths has ", widths.size(), " elements, expected ",
                  heights.size(), ", one for each of heights");
  for (size_t b = 0; b < heights.size(); ++b) {
    STD_TORCH_CHECK(heights[b] >= 0, op, ": heights[", b, "] is ", heights[b], "; it must not be negative");
    STD_TORCH_CHECK(widths[b] >= 0, op, ": widths[", b, "] is ", widths[b], "; it must not be negative");
  }
  std::vector<int64_t> sides = heights;
  sides.insert(sides.end(), widths.begin(), widths.end());
  check_shape(op, "factors", factors, {check_numels(op, k * r, sides, "heights and then widths")});
}

}  // namespace frog
