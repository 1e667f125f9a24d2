// Arguments of convolution_jvp, narrow_convolution and sampled_convolution_, checked alike on every device.
#pragma once

#include "tangents.h"
#include "windows.h"

namespace frog {

/// A number for each of `axes`, from `least`; or one for all, where that is allowed.
inline void check_axes(const char* op, const char* name, const std::vector<int64_t>& values, int64_t axes,
                       int64_t least, bool one_for_all = false) {
  const int64_t count = static_cast<int64_t>(values.size());
  STD_TORCH_CHECK(count == axes || (one_for_all && count == 1), op, ": ", name, " has ", count, " elements, expected ",
                  axes, ", one for each axis of an image");
  for (const int64_t value : values) {
    STD_TORCH_CHECK(value >= least && value < int64_t{1} << 31, op, ": ", name, " holds ", value,
                    "; accepted are integers from ", least, " below 2^31");
  }
}

/// What convolution_jvp is given beside its tensors.
struct ConvolutionOptions {
  std::vector<int64_t> stride, padding, dilation;
  bool transposed;
  std::vector<int64_t> output_padding;
  int64_t groups;
};

/// Places of an axis that a transposed convolution makes of `size`.
inline int64_t transposed_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                               int64_t output_padding) {
  return (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1;
}

/// x [B, C, *s], dx [k, B, C, *s]; weight [O, C / groups, *], or [C, O / groups, *] where transposed.
inline void check_convolution(const char* op, const Tensor& x, const Tensor& dx, const Tensor& weight,
                              const ConvolutionOptions& o) {
  check_floating(op, "x", x);
  check_dtype(op, "weight", weight, x.scalar_type());
  STD_TORCH_CHECK(x.dim() >= 3 && weight.dim() == x.dim(), op, ": x has shape ", shape_string(x),
                  " and weight has shape ", shape_string(weight), ", expected (batch, channels, *) and as many axes");
  check_tangents(op, "dx", dx, x);
  check_dtype(op, "dx", dx, x.scalar_type());
  const int64_t axes = x.dim() - 2;
  check_axes(op, "stride", o.stride, axes, 1, true);
  check_axes(op, "padding", o.padding, axes, 0, true);
  check_axes(op, "dilation", o.dilation, axes, 1, true);
  STD_TORCH_CHECK(o.groups >= 1 && weight.size(0) >= 1 && weight.size(0) % o.groups == 0, op, ": groups is ", o.groups,
                  " and weight has shape ", shape_string(weight),
                  "; its first axis must be at least 1 and divide into groups");
  const int64_t channels = o.transposed ? weight.size(0) : weight.size(1) * o.groups;
  STD_TORCH_CHECK(x.size(1) == channels, op, ": x has shape ", shape_string(x), ", expected ", channels,
                  " channels for weight ", shape_string(weight), " and groups ", o.groups);
  if (o.transposed) {
    check_axes(op, "output_padding", o.output_padding, axes, 0, true);
    return;
  }
  const auto of = [](const std::vector<int64_t>& values, int64_t a) { return values[values.size() == 1 ? 0 : a]; };
  for (int64_t a = 0; a < axes; ++a) {
    const int64_t spans = of(o.dilation, a) * (weight.size(2 + a) - 1) + 1, room = x.size(2 + a) + 2 * of(o.padding, a);
    STD_TORCH_CHECK(spans <= room, op, ": the kernel spans ", spans, " places of axis ", a,
                    ", but the padded image has ", room);
  }
}

/// Shape [B, O, *] of the convolution of x, whose arguments fit.
inline std::vector<int64_t> convolved_shape(const Tensor& x, const Tensor& weight, const ConvolutionOptions& o) {
  const auto of = [](const std::vector<int64_t>& values, int64_t a) { return values[values.size() == 1 ? 0 : a]; };
  std::vector<int64_t> shape{x.size(0), o.transposed ? weight.size(1) * o.groups : weight.size(0)};
  for (int64_t a = 0; a < x.dim() - 2; ++a) {
    const int64_t size = x.size(2 + a), kernel = weight.size(2 + a), stride = of(o.stride, a);
    const int64_t padding = of(o.padding, a), dilation = of(o.dilation, a);
    shape.push_back(o.transposed ? transposed_size(size, kernel, stride, padding, dilation, of(o.output_padding, a))
                                 : (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1);
  }
  return shape;
}

/// bias (O,), for a result with O channels.
inline void check_convolution_bias(const char* op, const Tensor& bias, const Tensor& x, int64_t channels) {
  check_dtype(op, "bias", bias, x.scalar_type());
  check_shape(op, "bias", bias, {channels});
}

/// x [images, groups * channels, *size], result [images, groups * filters, *count], and the weight [groups * filters,
/// channels, *kernel], or [groups * channels, filters, *kernel] where transposed.
struct ConvolutionSizes : WindowAxes {
  int64_t images = 0, channels = 0, filters = 0, groups = 1;  // channels and filters: of a group
  bool transposed = false;
  std::vector<int64_t> y_shape;

  int64_t rows() const { return channels * taps(); }  // elements of a filter
  /// Where on `axis` of the image lies what place j of the result finds through tap i; -1 where nothing does.
  int64_t input(int axis, int64_t j, int64_t i) const {
    const WindowAxis& a = axes[axis];
    int64_t at = a.at(j, i);
    if (transposed) {  // the image's places are the windows, and j is what some of them cover
      at = j + a.padding - i * a.dilation;
      at = at >= 0 && at % a.stride == 0 ? at / a.stride : -1;
    }
    return at >= 0 && at < a.size ? at : -1;
  }
};

inline void check_image_axes(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 3 && x.dim() <= 5, op, ": x has shape ", shape_string(x),
                  ", expected (batch, channels, *) with one to three more axes");
}

/// With `filters` in all groups.
inline ConvolutionSizes convolution_sizes(const char* op, const Tensor& x, int64_t filters,
                                          const std::vector<int64_t>& kernel, const ConvolutionOptions& o) {
  const int64_t axes = x.dim() - 2;
  check_axes(op, "kernel", kernel, axes, 1);
  check_axes(op, "stride", o.stride, axes, 1);
  check_axes(op, "padding", o.padding, axes, 0);
  check_axes(op, "dilation", o.dilation, axes, 1);
  check_axes(op, "output_padding", o.output_padding, axes, 0);
  STD_TORCH_CHECK(o.groups >= 1 && x.size(1) % o.groups == 0 && filters % o.groups == 0, op, ": groups is ", o.groups,
                  "; accepted is what divides ", x.size(1), " channels and ", filters, " outputs");
  ConvolutionSizes s;
  s.images = x.size(0), s.groups = o.groups, s.channels = x.size(1) / o.groups, s.filters = filters / o.groups;
  s.transposed = o.transposed;
  s.y_shape = {s.images, filters};
  for (int64_t j = 0; j < axes; ++j) {
    WindowAxis& a = s.axes[3 - axes + j];
    a = {x.size(2 + j), kernel[j], o.stride[j], o.padding[j], o.dilation[j], 1};
    const int64_t spans = a.dilation * (a.kernel - 1) + 1;
    if (o.transposed) {
      STD_TORCH_CHECK(o.output_padding[j] < std::max(a.stride, a.dilation), op, ": output_padding holds ",
                      o.output_padding[j], "; accepted is less than the stride ", a.stride, " or the dilation ",
                      a.dilation);
      a.count = transposed_size(a.size, a.kernel, a.stride, a.padding, a.dilation, o.output_padding[j]);
      STD_TORCH_CHECK(a.size >= 1 && a.count >= 1, op, ": x has ", a.size, " places of axis ", j,
                      ", and its transposed convolution ", a.count, "; accepted is at least 1 of both");
    } else {
      STD_TORCH_CHECK(o.output_padding[j] == 0, op, ": output_padding holds ", o.output_padding[j],
                      "; accepted is 0 unless transposed");
      STD_TORCH_CHECK(a.room() >= 0, op, ": the kernel spans ", spans, " places of axis ", j,
                      ", but the padded image has ", a.size + 2 * a.padding);
      a.count = a.room() / a.stride + 1;
    }
    s.y_shape.push_back(a.count);
  }
  return s;
}

inline ConvolutionSizes check_narrow_convolution(const char* op, const Tensor& x, const Tensor& weight,
                                                 const std::vector<int64_t>& stride,
                                                 const std::vector<int64_t>& padding,
                                                 const std::vector<int64_t>& dilation) {
  check_floating(op, "x", x);
  check_dtype(op, "weight", weight, x.scalar_type());
  check_image_axes(op, x);
  STD_TORCH_CHECK(weight.dim() == x.dim() && weight.size(0) >= 1 && weight.size(1) == x.size(1) && x.size(1) >= 1, op,
                  ": weight has shape ", shape_string(weight), ", expected (filters, ", x.size(1),
                  ", *) with a filter and a channel at least and as many axes as x");
  const std::vector<int64_t> shape = shape_of(weight);
  const std::vector<int64_t> none(stride.size(), 0);
  return convolution_sizes(op, x, shape[0], {shape.begin() + 2, shape.end()},
                           {stride, padding, dilation, false, none, 1});
}

/// self [k, B, O, *t] and x [B, C, *s], with t what the kernel makes of s.
inline ConvolutionSizes check_sampled_convolution(const char* op, const Tensor& self, const Tensor& x,
                                                  const Tensor& state, const std::vector<int64_t>& kernel,
                                                  const ConvolutionOptions& o, int64_t offset, int64_t first,
                                                  int64_t distribution) {
  check_floating(op, "x", x);
  check_dtype(op, "self", self, x.scalar_type());
  check_written(op, "self", self);
  check_image_axes(op, x);
  STD_TORCH_CHECK(self.dim() == x.dim() + 1, op, ": self has shape ", shape_string(self), " and x has shape ",
                  shape_string(x), ", expected (k, batch, outputs, *) with as many axes at the end");
  const ConvolutionSizes s = convolution_sizes(op, x, self.size(2), kernel, o);
  std::vector<int64_t> expected = s.y_shape;
  expected.insert(expected.begin(), self.size(0));
  check_shape(op, "self", self, expected);
  check_draw(op, state, self.size(0), first, distribution);
  check_range(op, s.groups * s.filters * s.rows(), offset);
  return s;
}

}  // namespace frog
