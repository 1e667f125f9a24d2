// The pointwise family as other operators fuse it.
#pragma once

#include "../stable_compat.h"

namespace frog {

/// y [*shape] holds x and becomes f(x); dy [k, *shape] becomes f'(x) * dy. Both contiguous, on the CPU and of the same
/// dtype, float32 or float64. `function`, `alpha` and `beta` as in POINTWISE of frog_cuda/ops/pointwise.py.
void apply_pointwise(int64_t function, double alpha, double beta, Tensor& y, Tensor& dy);

}  // namespace frog
