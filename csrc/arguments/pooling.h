// Arguments of max_pool_jvp, checked alike on every device.
#pragma once

#include "../checks.h"
#include "windows.h"

namespace frog {

/// x [planes, *size], y [planes, *count].
struct PoolSizes : WindowAxes {
  int64_t planes = 1;
  std::vector<int64_t> y_shape, dy_shape;
};

/// As torch.nn.functional.max_pool1d, 2d and 3d count windows: with ceil_mode one more where a part of it is left over,
/// unless it would begin in the padding on the far side.
inline int64_t pool_windows(const WindowAxis& a, bool ceil_mode) {
  const int64_t room = a.room();
  if (room + (ceil_mode ? a.stride - 1 : 0) < 0) return 0;
  const int64_t count = (room + (ceil_mode ? a.stride - 1 : 0)) / a.stride + 1;
  return ceil_mode && (count - 1) * a.stride >= a.size + a.padding ? count - 1 : count;
}

inline PoolSizes check_max_pool(const char* op, const Tensor& x, const Tensor& dx, const std::vector<int64_t>& kernel,
                                const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                const std::vector<int64_t>& dilation, bool ceil_mode) {
  check_floating(op, "x", x);
  check_floating(op, "dx", dx);
  check_tangents(op, "dx", dx, x);
  const int64_t spatial = static_cast<int64_t>(kernel.size());
  STD_TORCH_CHECK(spatial >= 1 && spatial <= 3, op, ": kernel has ", spatial, " entries; accepted are 1 to 3");
  STD_TORCH_CHECK(x.dim() >= spatial, op, ": x has shape ", shape_string(x), ", expected (*, s) with ", spatial,
                  " spatial axes, as many as kernel has entries");
  const auto check = [&](const char* name, const std::vector<int64_t>& list, int64_t least) {
    STD_TORCH_CHECK(static_cast<int64_t>(list.size()) == spatial, op, ": ", name, " has ", list.size(),
                    " entries, expected ", spatial, ", as many as kernel");
    for (const int64_t value : list) {
      STD_TORCH_CHECK(value >= least && value <= INT32_MAX, op, ": ", name, " has an entry ", value, "; accepted are ",
                      least, " to 2^31 - 1");
    }
  };
  check("kernel", kernel, 1);
  check("stride", stride, 1);
  check("padding", padding, 0);
  check("dilation", dilation, 1);
  PoolSizes s;
  s.y_shape = shape_of(x);
  const int64_t lead = x.dim() - spatial;
  for (int64_t j = 0; j < lead; ++j) s.planes *= x.size(j);
  for (int64_t j = 0; j < spatial; ++j) {
    WindowAxis& a = s.axes[3 - spatial + j];
    a = {x.size(lead + j), kernel[j], stride[j], padding[j], dilation[j], 1};
    STD_TORCH_CHECK(a.padding <= ((a.kernel - 1) * a.dilation + 1) / 2, op, ": padding has an entry ", a.padding,
                    "; accepted is at most half of what a window spans, ", (a.kernel - 1) * a.dilation + 1);
    a.count = a.size > 0 ? pool_windows(a, ceil_mode) : 0;
    STD_TORCH_CHECK(a.count >= 1, op, ": x has shape ", shape_string(x), ", in whose axis ", lead + j,
                    " no window fits; one spans ", (a.kernel - 1) * a.dilation + 1, " elements");
    s.y_shape[lead + j] = a.count;
  }
  STD_TORCH_CHECK(s.inputs() <= INT32_MAX, op, ": x has ", s.inputs(), " elements in its spatial axes; accepted are ",
                  "up to 2^31 - 1");
  s.dy_shape = s.y_shape;
  s.dy_shape.insert(s.dy_shape.begin(), dx.size(0));
  return s;
}

}  // namespace frog
