// max_pool_jvp: the largest element of every window, and of k tangents the elements at the same places;
// csrc/cpu/pooling.cpp is its twin.
#include "kernels/pooling.cuh"

#include "../arguments/pooling.h"
#include "dual.h"

namespace frog {
namespace {

constexpr const char* kOp = "max_pool_jvp";

std::tuple<Tensor, Tensor, Tensor> max_pool_jvp(const Tensor& x_, const Tensor& dx_, std::vector<int64_t> kernel,
                                                std::vector<int64_t> stride, std::vector<int64_t> padding,
                                                std::vector<int64_t> dilation, bool ceil_mode, bool want_indices) {
  check_same_device(kOp, "x", x_, dx_);
  check_same_device(kOp, "dx", dx_, x_);
  const PoolSizes s = check_max_pool(kOp, x_, dx_, kernel, stride, padding, dilation, ceil_mode);
  const OnDevice stream(x_);
  const Tensor x = as_contiguous(x_), dx = as_contiguous(dx_);
  Tensor y = new_on(x, s.y_shape, x.scalar_type()), dy = new_on(x, s.dy_shape, dx.scalar_type());
  Tensor indices = new_on(x, want_indices ? s.y_shape : std::vector<int64_t>{0}, ScalarType::Long);
  PoolShape shape{{}, s.planes};
  for (int j = 0; j < 3; ++j) {
    const WindowAxis& a = s.axes[j];
    shape.axis[j] = {a.size, a.kernel, a.stride, a.padding, a.dilation, a.count};
  }
  const auto go = [&](auto primal, auto word) {
    using X = decltype(primal);
    using W = decltype(word);
    launch_max_pool(in<X>(x), in<W>(dx), out<X>(y), out<W>(dy), want_indices ? out<int64_t>(indices) : nullptr, shape,
                    dx.size(0), stream);
  };
  dispatch_floating(kOp, x.scalar_type(), [&](auto primal) {
    switch (dx.element_size()) {
      case 8:
        return go(primal, uint64_t{});
      case 4:
        return go(primal, uint32_t{});
      default:
        return go(primal, uint16_t{});
    }
  });
  return {y, dy, indices};
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CUDA, m) { m.impl("max_pool_jvp", TORCH_BOX(&max_pool_jvp)); }

}  // namespace
}  // namespace frog
