// Arguments of cholesky_project, checked alike on every device.
#pragma once

#include "../checks.h"

namespace frog {

inline void check_projection(const char* op, const Tensor& gram, const Tensor& derivatives, double rtol) {
  check_floating(op, "gram", gram);
  check_floating(op, "derivatives", derivatives);
  STD_TORCH_CHECK((gram.dim() == 2 || gram.dim() == 3) && gram.size(-1) == gram.size(-2) && gram.size(-1) >= 1, op,
                  ": gram has shape ", shape_string(gram), ", expected (k, k) or (b, k, k) with k >= 1");
  STD_TORCH_CHECK(derivatives.dim() == gram.dim() && derivatives.size(-2) == gram.size(-1) &&
                      (gram.dim() == 2 || derivatives.size(0) == gram.size(0)),
                  op, ": derivatives has shape ", shape_string(derivatives),
                  ", expected (k, r) or (b, k, r) to match gram ", shape_string(gram));
  STD_TORCH_CHECK(rtol >= 0 && rtol < 1, op, ": rtol is ", rtol, ", expected a number in [0, 1)");
}

}  // namespace frog
