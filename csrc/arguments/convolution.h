// Arguments of convolution_jvp, checked alike on every device.
#pragma once

#include "../checks.h"

namespace frog {

inline void check_convolution(const char* op, const Tensor& x, const Tensor& dx, const Tensor& weight) {
  check_floating(op, "x", x);
  check_dtype(op, "weight", weight, x.scalar_type());
  STD_TORCH_CHECK(x.dim() >= 3 && weight.dim() == x.dim(), op, ": x has shape ", shape_string(x),
                  " and weight has shape ", shape_string(weight), ", expected (batch, channels, *) and as many axes");
  check_tangents(op, "dx", dx, x);
  check_dtype(op, "dx", dx, x.scalar_type());
}

/// bias (O,), for a result with O channels.
inline void check_convolution_bias(const char* op, const Tensor& bias, const Tensor& x, int64_t channels) {
  check_dtype(op, "bias", bias, x.scalar_type());
  check_shape(op, "bias", bias, {channels});
}

}  // namespace frog
