// convolution_jvp: a convolution of x and of k tangents of x. Linear in x, so k folds into the batch, and where x and
// dx are neighbours in memory, as the operators of this library leave them, value and tangents are one call: the
// library lays a weight out anew in every call, which for the late layers of a residual network costs as much as the
// products.
#include "../arguments/convolution.h"
#include "blocks.h"

namespace frog {
namespace {

constexpr const char* kOp = "convolution_jvp";

Tensor convolve(const Tensor& x, const Tensor& weight, const ConvolutionOptions& o) {
  return torch::stable::contiguous(
      convolution(x, weight, std::nullopt, o.stride, o.padding, o.dilation, o.transposed, o.output_padding, o.groups));
}

// y [B, O, *] += bias [O]
template <class T>
void add_bias(Tensor& y, const Tensor& bias) {
  const int64_t channels = y.size(1), inner = y.numel() / std::max<int64_t>(1, y.size(0) * channels);
  T* data = static_cast<T*>(y.mutable_data_ptr());
  const T* values = static_cast<const T*>(bias.const_data_ptr());
  for (int64_t row = 0; row < y.size(0) * channels; ++row) {
    const T value = values[row % channels];
    for (int64_t j = row * inner; j < (row + 1) * inner; ++j) data[j] += value;
  }
}

std::tuple<Tensor, Tensor> convolution_jvp(const Tensor& x_, const Tensor& dx_, const Tensor& weight,
                                           const std::optional<Tensor>& bias, std::vector<int64_t> stride,
                                           std::vector<int64_t> padding, std::vector<int64_t> dilation, bool transposed,
                                           std::vector<int64_t> output_padding, int64_t groups) {
  check_cpu(kOp, "x", x_);
  check_cpu(kOp, "dx", dx_);
  check_cpu(kOp, "weight", weight);
  const ConvolutionOptions options{stride, padding, dilation, transposed, output_padding, groups};
  check_convolution(kOp, x_, dx_, weight, options);
  const Tensor dx = torch::stable::contiguous(dx_);
  const Tensor x = torch::stable::contiguous(x_);
  const int64_t k = dx.size(0), batch = x.size(0);
  std::vector<int64_t> images = shape_of(x);
  Tensor y, dy;
  std::vector<int64_t> shape, dy_shape;
  const auto shapes_from = [&](const Tensor& result) {
    shape = shape_of(result), shape[0] = batch;
    dy_shape = shape, dy_shape.insert(dy_shape.begin(), k);
  };
  const char* end = static_cast<const char*>(x.const_data_ptr()) + x.numel() * static_cast<int64_t>(x.element_size());
  if (end == dx.const_data_ptr()) {
    images[0] = (1 + k) * batch;
    const Tensor all = convolve(part_of(x, 0, images), weight, options);  // dx outlives the call
    shapes_from(all);
    y = part_of(all, 0, shape), dy = part_of(all, all.numel() / (1 + k), dy_shape);
  } else {
    y = convolve(x, weight, options);
    shapes_from(y);
    images[0] = k * batch;
    const Tensor moved = convolve(torch::stable::view(dx, images), weight, options);
    dy = part_of(moved, 0, dy_shape);
  }
  if (bias) {
    check_cpu(kOp, "bias", *bias);
    check_convolution_bias(kOp, *bias, x, shape[1]);
    const Tensor dense = torch::stable::contiguous(*bias);
    dispatch_floating(kOp, x.scalar_type(), [&](auto zero) { add_bias<decltype(zero)>(y, dense); });
  }
  return {y, dy};
}

// The library's convolution with one tangent of the weight at a time, drawn and dropped again. A product of all k with
// the unfolded input, which they would share, was measured to be no faster (docs/performance.md).
void sampled_convolution_(Tensor& self, const Tensor& x_, const Tensor& state, std::vector<int64_t> kernel,
                          std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                          int64_t offset, int64_t first, int64_t distribution, bool add) {
  const char* op = "sampled_convolution_";
  const SampledConvolutionOptions o{kernel, stride, padding, dilation, offset, first, distribution};
  check_cpu(op, "self", self);
  check_cpu(op, "x", x_);
  check_cpu(op, "state", state);
  check_sampled_convolution(op, self, x_, state, o);
  const Tensor x = torch::stable::contiguous(x_);
  const int64_t k = self.size(0), outputs = self.size(2), weights = outputs * x.size(1) * o.kernel_size();
  draw_spec(op, state, k, first, distribution);  // raises before anything is written
  std::vector<int64_t> shape{outputs, x.size(1)};
  shape.insert(shape.end(), kernel.begin(), kernel.end());
  Tensor target = torch::stable::contiguous(self);  // self itself where it is contiguous
  const ConvolutionOptions options{stride, padding, dilation, false, std::vector<int64_t>(kernel.size(), 0), 1};
  for (int64_t i = 0; i < k; ++i) {
    std::array<StableIValue, 7> stack{detail::box(state),          detail::box(int64_t{1}), detail::box(weights),
                                      detail::box(offset),         detail::box(first + i),  detail::box(distribution),
                                      detail::box(x.scalar_type())};
    const Tensor v = detail::call_for_tensor("frog_cuda::sample_tangents", "", stack.data());
    const Tensor moved = convolve(x, torch::stable::view(v, shape), options);  // [B, O, *]
    dispatch_floating(op, x.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      using C = typename ComputeOf<T>::type;
      T* to = static_cast<T*>(target.mutable_data_ptr()) + i * moved.numel();
      const T* from = static_cast<const T*>(moved.const_data_ptr());
      torch::stable::parallel_for(0, moved.numel(), kWork, [&](int64_t a, int64_t b) {
        if (!add) {
          std::copy(from + a, from + b, to + a);
          return;
        }
        for (int64_t j = a; j < b; ++j) to[j] = static_cast<T>(static_cast<C>(to[j]) + static_cast<C>(from[j]));
      });
    });
  }
  if (target.data_ptr() != self.data_ptr()) torch::stable::copy_(self, target);
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CPU, m) {
  m.impl("convolution_jvp", TORCH_BOX(&convolution_jvp));
  m.impl("sampled_convolution_", TORCH_BOX(&sampled_convolution_));
}

}  // namespace
}  // namespace frog
