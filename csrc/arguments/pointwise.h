// Arguments of pointwise_jvp and of fused activations, checked alike on every device.
#pragma once

#include "../checks.h"

namespace frog {

/// Checks a code of POINTWISE in frog_cuda/ops/pointwise.py and its parameters.
inline void check_function(const char* op, int64_t function, double alpha, double beta) {
  constexpr int64_t kFunctions = 11, kLast = kFunctions - 1;  // the last one is hardtanh
  STD_TORCH_CHECK(function >= 0 && function < kFunctions, op, ": function is ", function, "; accepted are 0 to ",
                  kLast);
  STD_TORCH_CHECK(function != kLast || alpha <= beta, op, ": hardtanh has alpha (min_val) ", alpha,
                  " and beta (max_val) ", beta, "; min_val must not be larger");
}

/// Number of tangents, from whichever of dx and activity is given.
inline int64_t check_given(const char* op, const std::optional<Tensor>& dx, const std::optional<Tensor>& activity) {
  STD_TORCH_CHECK(dx || activity, op, ": dx and activity are both None; at least one must be given");
  const Tensor& given = dx ? *dx : *activity;
  STD_TORCH_CHECK(given.dim() >= 1, op,
                  dx ? ": dx has shape (), expected (k, *x.shape)" : ": activity has shape (), expected (k, *s)");
  check_k(op, given.size(0));
  return given.size(0);
}

}  // namespace frog
