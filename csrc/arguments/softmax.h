// Arguments of softmax_jvp and log_softmax_jvp, checked alike on every device.
#pragma once

#include "../checks.h"

namespace frog {

/// x as [outer, classes, inner], the softmax over `classes`.
struct SoftmaxSizes {
  int64_t outer = 1, classes = 1, inner = 1;
};

inline SoftmaxSizes check_softmax(const char* op, const Tensor& x, int64_t dim) {
  const int64_t axes = std::max<int64_t>(1, x.dim());
  STD_TORCH_CHECK(dim >= -axes && dim < axes, op, ": dim is ", dim, "; accepted for x of shape ", shape_string(x),
                  " are ", -axes, " to ", axes - 1);
  const int64_t axis = dim < 0 ? dim + axes : dim;
  SoftmaxSizes s;
  for (int64_t j = 0; j < axis; ++j) s.outer *= x.size(j);
  for (int64_t j = axis + 1; j < x.dim(); ++j) s.inner *= x.size(j);
  if (x.dim() > 0) s.classes = x.size(axis);
  return s;
}

}  // namespace frog
