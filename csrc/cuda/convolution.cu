// convolution_jvp by the library: one call for the value, one for the tangents folded into its batch.
#include "../arguments/convolution.h"
#include "device.h"

namespace frog {
namespace {

constexpr const char* kOp = "convolution_jvp";

std::tuple<Tensor, Tensor> convolution_jvp(const Tensor& x, const Tensor& dx, const Tensor& weight,
                                           const std::optional<Tensor>& bias, std::vector<int64_t> stride,
                                           std::vector<int64_t> padding, std::vector<int64_t> dilation, bool transposed,
                                           std::vector<int64_t> output_padding, int64_t groups) {
  check_same_device(kOp, "x", x, dx);
  check_same_device(kOp, "dx", dx, x);
  check_same_device(kOp, "weight", weight, x);
  check_convolution(kOp, x, dx, weight);
  if (bias) {
    check_same_device(kOp, "bias", *bias, x);
    check_convolution_bias(kOp, *bias, x, transposed ? weight.size(1) * groups : weight.size(0));
  }
  const OnDevice stream(x);
  const auto convolve = [&](const Tensor& input, const std::optional<Tensor>& b) {
    return torch::stable::contiguous(
        convolution(input, weight, b, stride, padding, dilation, transposed, output_padding, groups));
  };
  const int64_t k = dx.size(0), batch = x.size(0);
  std::vector<int64_t> images = shape_of(x);
  images[0] = k * batch;
  const Tensor y = convolve(x, bias);
  const Tensor moved = convolve(torch::stable::view(torch::stable::contiguous(dx), images), std::nullopt);
  std::vector<int64_t> shape = shape_of(y);
  shape.insert(shape.begin(), k);
  return {y, torch::stable::view(moved, shape)};
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CUDA, m) { m.impl("convolution_jvp", TORCH_BOX(&convolution_jvp)); }

}  // namespace
}  // namespace frog
