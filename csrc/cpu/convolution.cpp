// convolution_jvp: a convolution of x and of k tangents of x. Linear in x, so k folds into the batch, and where x and
// dx are neighbours in memory, as the operators of this library leave them, value and tangents are one call: the
// library lays a weight out anew in every call, which for the late layers of a residual network costs as much as the
// products.
#include <cstring>
#include <tuple>

#include "../arguments/convolution.h"
#include "blocks.h"
#include "convolution_direct.h"
#include "product.h"

namespace frog {
namespace {

constexpr const char* kOp = "convolution_jvp";

// PyTorch chooses its library for convolutions in float32 by the number of images, too (use_mkldnn): on one thread,
// fewer than 16 take another way through filters of one element, and so does a single small image through a small
// filter. Of filters it looks at the last two axes, of images at the first four.
constexpr int64_t kFewestImages = 16;

int64_t fewest_images(const Tensor& x, const Tensor& weight, const ConvolutionOptions& o) {
  constexpr int64_t kSmallImage = 20480;
  if (x.scalar_type() != ScalarType::Float || x.numel() == 0) return 0;
  const auto ones = [](const std::vector<int64_t>& v) {
    return std::all_of(v.begin(), v.end(), [](int64_t n) { return n == 1; });
  };
  const int64_t high = weight.dim() > 3 ? weight.size(weight.dim() - 2) : 1, wide = weight.size(weight.dim() - 1);
  const bool plain = ones(o.stride) && ones(o.dilation);
  if (plain && high == 1 && wide == 1 && torch::stable::get_num_threads() == 1) return kFewestImages;
  int64_t size = 1;
  for (int64_t a = 0; a < std::min<int64_t>(4, x.dim()); ++a) size *= x.size(a);
  const bool small = o.groups == 1 && (high <= 3 || wide <= 3) && size <= kSmallImage;
  return x.size(0) == 1 && small ? 2 : 0;
}

using Convolve = Tensor (*)(const Tensor&, const Tensor&, const ConvolutionOptions&);

Tensor convolve(const Tensor& x, const Tensor& weight, const ConvolutionOptions& o) {
  return as_contiguous(
      convolution(x, weight, std::nullopt, o.stride, o.padding, o.dilation, o.transposed, o.output_padding, o.groups));
}

// Value and tangents of x without channels, of which the library makes a result without channels, too, whatever the
// weight has.
std::tuple<Tensor, Tensor> convolve_nothing(const Tensor& x, const Tensor& weight, const ConvolutionOptions& o,
                                            int64_t k) {
  const Tensor y = convolve(x, weight, o);
  std::vector<int64_t> shape = shape_of(y);
  STD_TORCH_CHECK(y.numel() == 0, kOp, ": a convolution of no channels has shape ", shape_string(y));
  shape.insert(shape.begin(), k);
  return {y, new_tensor(x, shape, x.scalar_type())};
}

// With images of zeros beside too few of them, so that the bits of each do not depend on how many tangents there are.
Tensor convolve_alike(const Tensor& x, const Tensor& weight, const ConvolutionOptions& o) {
  const int64_t fewest = fewest_images(x, weight, o);
  if (x.size(0) >= fewest) return convolve(x, weight, o);
  std::vector<int64_t> shape = shape_of(x);
  shape[0] = fewest;
  Tensor more = new_tensor(x, shape, x.scalar_type());
  const size_t bytes = static_cast<size_t>(x.numel()) * x.element_size();
  char* data = static_cast<char*>(more.mutable_data_ptr());
  std::memcpy(data, x.const_data_ptr(), bytes);
  std::memset(data + bytes, 0, static_cast<size_t>(more.numel()) * x.element_size() - bytes);
  const Tensor result = convolve(more, weight, o);
  shape = shape_of(result), shape[0] = x.size(0);
  return part_of(result, 0, shape);
}

// Into how many calls of the library a convolution is divided. It lays images and results out anew in memory of its
// own, which goes back to the system and cannot be that of other results: with few images it is little, and stays in
// cache. The weight is laid out anew in every call.
int64_t calls_of_library(int64_t images, int64_t result_bytes, int64_t weight_bytes) {
  constexpr int64_t kCallBytes = int64_t{2} << 20;
  const int64_t each = std::max<int64_t>(1, result_bytes / std::max<int64_t>(1, images));
  const int64_t fewest = std::max(kFewestImages, std::max(kCallBytes, 4 * weight_bytes) / each);
  return std::max<int64_t>(1, images / fewest);
}

// Calls body(first element, result) for a convolution of x, some images after the other; `numel` elements in all.
template <class Body>
void for_convolved(Convolve by, const Tensor& x, const Tensor& weight, const ConvolutionOptions& o, int64_t numel,
                   const Body& body) {
  const int64_t images = x.size(0), bytes = static_cast<int64_t>(x.element_size());
  const int64_t calls = calls_of_library(images, numel * bytes, weight.numel() * bytes);
  std::vector<int64_t> shape = shape_of(x);
  for (int64_t call = 0; images > 0 && call < calls; ++call) {
    const int64_t first = call * images / calls;
    shape[0] = (call + 1) * images / calls - first;
    body(numel / images * first, by(part_of(x, x.numel() / images * first, shape), weight, o));
  }
}

// The same as one tensor at `to`.
void convolve_to(char* to, Convolve by, const Tensor& x, const Tensor& weight, const ConvolutionOptions& o,
                 int64_t numel) {
  const int64_t bytes = static_cast<int64_t>(x.element_size());
  for_convolved(by, x, weight, o, numel, [&](int64_t first, const Tensor& part) {
    const char* from = static_cast<const char*>(part.const_data_ptr());
    torch::stable::parallel_for(0, part.numel(), kWork, [&](int64_t a, int64_t b) {
      std::memcpy(to + (first + a) * bytes, from + a * bytes, static_cast<size_t>((b - a) * bytes));
    });
  });
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

// With one number for each axis of an image
ConvolutionOptions for_each_axis(ConvolutionOptions o, int64_t axes) {
  for (auto* values : {&o.stride, &o.padding, &o.dilation, &o.output_padding}) {
    if (values->size() == 1) values->resize(static_cast<size_t>(axes), values->front());
  }
  return o;
}

ConvolutionSizes sizes_of(const Tensor& x, const Tensor& weight, const ConvolutionOptions& o) {
  const std::vector<int64_t> shape = shape_of(weight);
  return convolution_sizes(kOp, x, shape[0], {shape.begin() + 2, shape.end()}, for_each_axis(o, x.dim() - 2));
}

// Whether most of the kernel lies in the padding, which the library multiplies with all the same: of 3x3 on images of
// 2x2, five elements in nine. It asks for sizes alone, so that neither threads nor the number of tangents decide.
// Measured with 256 channels on 2x2, 3x3: two thirds of the time from 32 images, as much from 4, more from a single
// one.
bool small_images(const Tensor& x, const Tensor& weight, const ConvolutionOptions& o) {
  constexpr int64_t kFewest = 4, kFewestChannels = 16, kLargest = 64;
  const bool floats = x.scalar_type() == ScalarType::Float && has_tile<float>();
  const bool doubles = x.scalar_type() == ScalarType::Double && has_tile<double>();
  if (o.transposed || x.dim() > 5 || x.numel() == 0 || !(floats || doubles)) return false;
  const ConvolutionSizes s = sizes_of(x, weight, o);
  if (s.images < kFewest || std::min(s.channels, s.filters) < kFewestChannels) return false;
  double met = 1;  // the share of taps that lie in the image
  for (int a = 0; a < 3; ++a) {
    int64_t inside = 0;
    const WindowAxis& axis = s.axes[a];
    if (axis.size > kLargest) continue;  // hardly any padding, and many places to ask
    for (int64_t j = 0; j < axis.count; ++j) {
      for (int64_t i = 0; i < axis.kernel; ++i) inside += s.input(a, j, i) >= 0;
    }
    met *= static_cast<double>(inside) / static_cast<double>(std::max<int64_t>(1, axis.count * axis.kernel));
  }
  return 2 * met < 1;
}

// y = conv(x, weight) for small images
void convolve_small(const Tensor& x, const Tensor& weight_, const ConvolutionOptions& o, Tensor& y) {
  const Tensor weight = as_contiguous(weight_);
  const ConvolutionSizes s = sizes_of(x, weight, o);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    direct::convolve(s, direct::Stored<T>{static_cast<const T*>(weight.const_data_ptr())},
                     static_cast<const T*>(x.const_data_ptr()), false, static_cast<T*>(y.mutable_data_ptr()));
  };
  if (x.scalar_type() == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
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
  const Tensor dx = as_contiguous(dx_);
  const Tensor x = as_contiguous(x_);
  const int64_t k = dx.size(0), batch = x.size(0);
  if (bias) {
    check_cpu(kOp, "bias", *bias);
    check_convolution_bias(kOp, *bias, x, transposed ? weight.size(1) * groups : weight.size(0));
  }
  if (x.size(1) == 0) return convolve_nothing(x, weight, options, k);
  const std::vector<int64_t> shape = convolved_shape(x, weight, options);
  int64_t numel = 1;
  for (const int64_t size : shape) numel *= size;
  const char* end = static_cast<const char*>(x.const_data_ptr()) + x.numel() * static_cast<int64_t>(x.element_size());
  const bool neighbours = end == dx.const_data_ptr();
  std::vector<int64_t> images = shape_of(x);
  images[0] = (neighbours ? 1 + k : k) * batch;
  const Tensor moved = neighbours ? part_of(x, 0, images) : torch::stable::view(dx, images);  // dx outlives the call
  const int64_t bytes = numel * static_cast<int64_t>(x.element_size()),
                several = images[0] / std::max<int64_t>(1, batch);
  Tensor y, dy;
  if (small_images(x, weight, options)) {
    std::tie(y, dy) = new_dual(x, shape, k, x.scalar_type(), x.scalar_type());
    if (!neighbours) convolve_small(x, weight, options, y);
    convolve_small(moved, weight, options, neighbours ? y : dy);
  } else if (calls_of_library(images[0], several * bytes, weight.numel() * static_cast<int64_t>(x.element_size())) ==
             1) {
    std::vector<int64_t> dy_shape = shape;
    dy_shape.insert(dy_shape.begin(), k);
    const Tensor all = convolve_alike(moved, weight, options);
    STD_TORCH_CHECK(all.numel() == several * numel, kOp, ": the library's result has shape ", shape_string(all),
                    ", expected ", several, " times ", shape_string(shape));
    y = neighbours ? part_of(all, 0, shape) : convolve_alike(x, weight, options);
    dy = part_of(all, neighbours ? numel : 0, dy_shape);
  } else {
    std::tie(y, dy) = new_dual(x, shape, k, x.scalar_type(), x.scalar_type());
    if (!neighbours) {
      convolve_to(static_cast<char*>(y.mutable_data_ptr()), convolve_alike, x, weight, options, numel);
    }
    convolve_to(static_cast<char*>((neighbours ? y : dy).mutable_data_ptr()), convolve_alike, moved, weight, options,
                several * numel);
  }
  if (bias) {
    const Tensor dense = as_contiguous(*bias);
    dispatch_floating(kOp, x.scalar_type(), [&](auto zero) { add_bias<decltype(zero)>(y, dense); });
  }
  return {y, dy};
}

// sums [*count] += what tap t has at the windows' places, of products [*size], which it may change
template <class T>
void add_shifted(const ConvolutionSizes& s, int64_t t, T* products, T* sums) {
  const auto& [depth, height, width] = s.axes;
  const auto shift_of = [](const WindowAxis& a, int64_t tap) { return tap * a.dilation - a.padding; };
  const int64_t dz = shift_of(depth, t / width.kernel / height.kernel);
  const int64_t dy = shift_of(height, t / width.kernel % height.kernel), dx = shift_of(width, t % width.kernel);
  const int64_t lines = height.count, area = height.size * width.size;
  const bool flat = width.stride == 1 && height.stride == 1 && width.count == width.size && lines == height.size;
  for (int64_t j = 0; j < depth.count; ++j) {
    const int64_t z = j * depth.stride + dz;
    if (z < 0 || z >= depth.size) continue;
    T *plane = products + z * area, *sum = sums + j * lines * width.count;
    if (flat) {
      // A plane in one run, however short its lines: with zeros for what would come from the end of the next line
      const int64_t from = dx > 0 ? 0 : std::max<int64_t>(0, width.size + dx);
      const int64_t to = dx > 0 ? std::min(dx, width.size) : width.size;
      for (int64_t v = 0; dx != 0 && v < height.size; ++v) {
        std::fill(plane + v * width.size + from, plane + v * width.size + to, T(0));
      }
      const int64_t shift = dy * width.size + dx;
      for (int64_t i = std::max<int64_t>(0, -shift); i < std::min(area, area - shift); ++i) sum[i] += plane[i + shift];
      continue;
    }
    const int64_t low = dx >= 0 ? 0 : ceil_div(-dx, width.stride);  // windows low .. high have the tap inside
    const int64_t high = dx >= width.size ? 0 : std::min(width.count, (width.size - 1 - dx) / width.stride + 1);
    for (int64_t line = 0; line < lines; ++line) {
      const int64_t v = line * height.stride + dy;
      if (v < 0 || v >= height.size) continue;
      const T* values = plane + v * width.size + dx;
      for (int64_t i = low; i < high; ++i) sum[line * width.count + i] += values[i * width.stride];
    }
  }
}

// Of x [images, channels, *size] and w [filters, channels, *kernel], y [images, filters, *count]. The library takes
// filters 16 at a time, however few there are. Here images are multiplied with all taps at once, small ones side by
// side, and the products are shifted to where they belong: sum_t (w_t x)[place + t]. Strides waste some: all places are
// multiplied.
template <class T>
void narrow(const ConvolutionSizes& s, const T* x, const T* w, T* y) {
  constexpr int64_t kProductBytes = 256 * 1024;  // of some images with some filters, in second-level cache
  const int64_t channels = s.channels, taps = s.taps(), inputs = s.inputs(), outputs = s.outputs();
  const int64_t panel = panel_width<T>(), vector = vector_width<T>();
  const int64_t side_by_side = panel / std::max<int64_t>(1, inputs);  // images in a panel
  const int64_t several = std::clamp<int64_t>(side_by_side, 1, std::max<int64_t>(1, s.images));
  const int64_t places = several * inputs, ld = ceil_div(places, vector) * vector;
  const bool as_it_is = several == 1 && inputs % vector == 0;  // an image consists of whole vectors
  const int64_t fitting = kProductBytes / std::max<int64_t>(1, taps * ld * static_cast<int64_t>(sizeof(T)));
  const int64_t together = std::clamp<int64_t>(fitting, 1, std::max<int64_t>(1, s.filters));
  const int64_t groups = ceil_div(s.filters, together);
  Scratch<T> rows(s.filters * taps * channels);  // w as [filters, taps, channels]
  for (int64_t f = 0; f < s.filters; ++f) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t t = 0; t < taps; ++t) rows.data()[(f * taps + t) * channels + c] = w[(f * channels + c) * taps + t];
    }
  }
  const int64_t work = together * taps * channels * ld / 8;  // of a task, in units of a copied element
  const int64_t grain = std::max<int64_t>(1, kWork / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, ceil_div(s.images, several) * groups, grain, [&](int64_t from, int64_t to) {
    Scratch<T> products(together * taps * ld), columns(as_it_is ? 0 : channels * panel);
    for (int64_t task = from; task < to; ++task) {
      const int64_t image = task / groups * several, images = std::min(several, s.images - image);
      const int64_t first = task % groups * together, filters = std::min(together, s.filters - first);
      const T* pixels = x + image * channels * inputs;
      for (int64_t p = 0; p < places; p += panel) {
        const int64_t wide = std::min(panel, ld - p), live = std::min(wide, inputs - p);  // live: of a single image
        for (int64_t c = 0; !as_it_is && c < channels; ++c) {
          T* column = columns.data() + c * wide;
          for (int64_t i = 0; i < images; ++i) {
            const T* source = pixels + (i * channels + c) * inputs + p;
            std::copy(source, source + live, column + i * inputs);
          }
          const int64_t filled = several == 1 ? live : images * inputs;
          std::fill(column + filled, column + wide, T(0));
        }
        tile(as_it_is ? pixels + p : columns.data(), as_it_is ? inputs : wide, wide,
             rows.data() + first * taps * channels, channels, filters * taps, channels, products.data() + p, ld, true);
      }
      for (int64_t f = 0; f < filters; ++f) {
        for (int64_t i = 0; i < images; ++i) {
          T* sums = y + ((image + i) * s.filters + first + f) * outputs;
          std::fill(sums, sums + outputs, T(0));
          for (int64_t t = 0; t < taps; ++t) {
            add_shifted(s, t, products.data() + (f * taps + t) * ld + i * inputs, sums);
          }
        }
      }
    }
  });
}

Tensor narrow_convolution(const Tensor& x_, const Tensor& weight, std::vector<int64_t> stride,
                          std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const char* op = "narrow_convolution";
  check_cpu(op, "x", x_);
  check_cpu(op, "weight", weight);
  const ConvolutionSizes s = check_narrow_convolution(op, x_, weight, stride, padding, dilation);
  const ScalarType compute = x_.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor x = as_contiguous(to_dtype(x_, compute));
  const Tensor w = as_contiguous(to_dtype(weight, compute));
  Tensor y = new_tensor(x, s.y_shape, compute);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    narrow(s, static_cast<const T*>(x.const_data_ptr()), static_cast<const T*>(w.const_data_ptr()),
           static_cast<T*>(y.mutable_data_ptr()));
  };
  if (compute == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
  return to_dtype(y, x_.scalar_type());
}

// target [k, B, O, *] += the library's convolution with one tangent of the weight at a time, drawn and dropped again; =
// without add. For machines whose vectors make no register tile.
template <class E>
void sampled_by_library(Tensor& target, const Tensor& x, const Tensor& state, const std::vector<int64_t>& kernel,
                        const ConvolutionOptions& o, int64_t offset, int64_t first, int64_t distribution, bool add) {
  using C = typename ComputeOf<E>::type;
  const int64_t k = target.size(0), numel = target.numel() / std::max<int64_t>(1, k);
  std::vector<int64_t> shape{target.size(2), x.size(1)};  // of the weight
  if (o.transposed) std::swap(shape[0], shape[1]);
  shape[1] /= o.groups;
  shape.insert(shape.end(), kernel.begin(), kernel.end());
  int64_t weights = 1;
  for (const int64_t n : shape) weights *= n;
  for (int64_t i = 0; i < k; ++i) {
    std::array<StableIValue, 7> stack{detail::box(state),          detail::box(int64_t{1}), detail::box(weights),
                                      detail::box(offset),         detail::box(first + i),  detail::box(distribution),
                                      detail::box(x.scalar_type())};
    const Tensor w =
        torch::stable::view(detail::call_for_tensor("frog_cuda::sample_tangents", "", stack.data()), shape);
    E* row = static_cast<E*>(target.mutable_data_ptr()) + i * numel;  // [B, O, *]
    for_convolved(convolve, x, w, o, numel, [&](int64_t at, const Tensor& part) {
      const E* from = static_cast<const E*>(part.const_data_ptr());
      torch::stable::parallel_for(0, part.numel(), kWork, [&](int64_t a, int64_t b) {
        E* to = row + at;
        for (int64_t j = a; j < b; ++j) {
          to[j] = add ? static_cast<E>(static_cast<C>(to[j]) + static_cast<C>(from[j])) : from[j];
        }
      });
    });
  }
}

void sampled_convolution_(Tensor& self, const Tensor& x_, const Tensor& state, std::vector<int64_t> kernel,
                          std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                          bool transposed, std::vector<int64_t> output_padding, int64_t groups, int64_t offset,
                          int64_t first, int64_t distribution, bool add) {
  const char* op = "sampled_convolution_";
  check_cpu(op, "self", self);
  check_cpu(op, "x", x_);
  const ConvolutionOptions o{stride, padding, dilation, transposed, output_padding, groups};
  const ConvolutionSizes s = check_sampled_convolution(op, self, x_, state, kernel, o, offset, first, distribution);
  const DrawSpec spec = draw_spec(op, state, self.size(0), first, distribution);
  dispatch_floating(op, x_.scalar_type(), [&](auto zero) {
    using E = decltype(zero);
    using T = typename ComputeOf<E>::type;
    Tensor target = as_contiguous(self);  // self itself where it is contiguous
    if (s.channels == 0) {                // sums of nothing, where the library would make no channels
      if (!add) torch::stable::zero_(target);
    } else if (has_tile<T>()) {
      const ScalarType compute = sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
      const Tensor x = as_contiguous(to_dtype(x_, compute));
      direct::convolve(s, direct::Drawn{spec, offset, self.size(0)}, static_cast<const T*>(x.const_data_ptr()), add,
                       static_cast<E*>(target.mutable_data_ptr()));
    } else {
      sampled_by_library<E>(target, as_contiguous(x_), state, kernel, o, offset, first, distribution, add);
    }
    if (target.data_ptr() != self.data_ptr()) torch::stable::copy_(self, target);
  });
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CPU, m) {
  m.impl("convolution_jvp", TORCH_BOX(&convolution_jvp));
  m.impl("narrow_convolution", TORCH_BOX(&narrow_convolution));
  m.impl("sampled_convolution_", TORCH_BOX(&sampled_convolution_));
}

}  // namespace
}  // namespace frog
