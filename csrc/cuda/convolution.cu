// convolution_jvp by the library: one call for the value, one for the tangents folded into its batch. Products with
// sampled weight tangents are kernels/convolution.cuh's.
#include "kernels/convolution.cuh"

#include "../arguments/convolution.h"
#include "device.h"

namespace frog {

// In convolution_sampled.cu, so that the two compile side by side.
extern template void launch_sampled_convolution<float>(const SampledConvolution<float>&, int64_t, cudaStream_t);
extern template void launch_sampled_convolution<double>(const SampledConvolution<double>&, int64_t, cudaStream_t);
extern template void launch_sampled_convolution<bf16>(const SampledConvolution<bf16>&, int64_t, cudaStream_t);
extern template void launch_sampled_convolution<fp16>(const SampledConvolution<fp16>&, int64_t, cudaStream_t);

namespace {

constexpr const char* kOp = "convolution_jvp";

std::tuple<Tensor, Tensor> convolution_jvp(const Tensor& x, const Tensor& dx, const Tensor& weight,
                                           const std::optional<Tensor>& bias, std::vector<int64_t> stride,
                                           std::vector<int64_t> padding, std::vector<int64_t> dilation, bool transposed,
                                           std::vector<int64_t> output_padding, int64_t groups) {
  check_same_device(kOp, "x", x, dx);
  check_same_device(kOp, "dx", dx, x);
  check_same_device(kOp, "weight", weight, x);
  check_convolution(kOp, x, dx, weight, {stride, padding, dilation, transposed, output_padding, groups});
  if (bias) {
    check_same_device(kOp, "bias", *bias, x);
    check_convolution_bias(kOp, *bias, x, transposed ? weight.size(1) * groups : weight.size(0));
  }
  const OnDevice stream(x);
  const auto convolve = [&](const Tensor& input, const std::optional<Tensor>& b) {
    return as_contiguous(convolution(input, weight, b, stride, padding, dilation, transposed, output_padding, groups));
  };
  const int64_t k = dx.size(0), batch = x.size(0);
  std::vector<int64_t> images = shape_of(x);
  images[0] = k * batch;
  const Tensor y = convolve(x, bias);
  const Tensor moved = convolve(torch::stable::view(as_contiguous(dx), images), std::nullopt);
  std::vector<int64_t> shape = shape_of(y);
  shape.insert(shape.begin(), k);
  return {y, torch::stable::view(moved, shape)};
}

Tensor narrow_convolution(const Tensor& x, const Tensor& weight, std::vector<int64_t> stride,
                          std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const char* op = "narrow_convolution";
  check_same_device(op, "weight", weight, x);
  check_narrow_convolution(op, x, weight, stride, padding, dilation);
  const OnDevice stream(x);
  const std::vector<int64_t> none(stride.size(), 0);
  return as_contiguous(convolution(x, weight, std::nullopt, stride, padding, dilation, false, none, /*groups=*/1));
}

// The three axes of `values`, those of fewer filled up with `missing` in front.
Axes three(const std::vector<int64_t>& values, int missing) {
  Axes axes{{missing, missing, missing}};
  const size_t lead = 3 - values.size();
  for (size_t a = 0; a < values.size(); ++a) axes.at[lead + a] = static_cast<int>(values[a]);
  return axes;
}

void sampled_convolution_(Tensor& self, const Tensor& x_, const Tensor& state, std::vector<int64_t> kernel,
                          std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                          bool transposed, std::vector<int64_t> output_padding, int64_t groups, int64_t offset,
                          int64_t first, int64_t distribution, bool add) {
  const char* op = "sampled_convolution_";
  check_same_device(op, "self", self, x_);
  check_same_device(op, "x", x_, self);
  check_same_device(op, "state", state, self);
  const ConvolutionOptions options{stride, padding, dilation, transposed, output_padding, groups};
  const ConvolutionSizes s =
      check_sampled_convolution(op, self, x_, state, kernel, options, offset, first, distribution);
  const std::vector<int64_t> shape = shape_of(self), images = shape_of(x_);
  const int64_t k = shape[0], columns = s.rows();
  const int64_t places = self.numel() / std::max<int64_t>(1, k * shape[1] * shape[2]);
  constexpr int64_t kMost = int64_t{1} << 31;
  // Of all groups, and of the axis that windows move along, so that whatever is counted in one of them fits an int.
  int64_t most = std::max({x_.numel() / std::max<int64_t>(1, images[0]), places, columns});
  for (const WindowAxis& a : s.axes) most = std::max(most, (transposed ? a.count : a.size) + 2 * a.padding);
  STD_TORCH_CHECK(k <= 65535 && most < kMost, op, ": k is ", k, ", x has shape ", shape_string(x_),
                  " and self has shape ", shape_string(self),
                  "; accepted on a GPU are up to 65535 tangents and fewer than 2^31 elements of an image or a ",
                  "kernel and places of a padded axis");
  const OnDevice stream(self);
  const Tensor x = as_contiguous(x_);
  Tensor target = as_contiguous(self);  // self itself where it is contiguous
  if (columns == 0 && !add) torch::stable::zero_(target);
  dispatch_floating(op, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using C = typename Compute<T>::type;
    SampledConvolution<T> p{};
    p.x = in<T>(x), p.batch = images[0], p.groups = s.groups, p.channels = static_cast<int>(s.channels);
    p.image = three({images.begin() + 2, images.end()}, 1), p.result = three({shape.begin() + 3, shape.end()}, 1);
    p.kernel = three(kernel, 1), p.stride = three(stride, 1), p.padding = three(padding, 0);
    p.dilation = three(dilation, 1);
    p.transposed = s.transposed, p.out = s.filters, p.k = k, p.state = in<int64_t>(state), p.first = first,
    p.offset = offset;
    p.dy = out<T>(target), p.add = add;
    p.split_columns = convolution_split_columns(p, distribution);
    std::optional<Tensor> partials;
    const int64_t splits = ceil_div(columns, p.split_columns);
    if (splits > 1) {
      partials = new_on(x, {splits, self.numel()}, sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float);
      p.partials = out<C>(*partials);
    }
    launch_sampled_convolution(p, distribution, stream);
  });
  if (target.data_ptr() != self.data_ptr()) torch::stable::copy_(self, target);
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CUDA, m) {
  m.impl("convolution_jvp", TORCH_BOX(&convolution_jvp));
  m.impl("narrow_convolution", TORCH_BOX(&narrow_convolution));
  m.impl("sampled_convolution_", TORCH_BOX(&sampled_convolution_));
}

}  // namespace
}  // namespace frog
