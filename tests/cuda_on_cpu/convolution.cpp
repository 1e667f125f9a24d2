#include "cuda/kernels/convolution.cuh"

#include <vector>

#include "exported.h"

namespace {

using namespace frog;

// As csrc/cuda/convolution.cu launches it. sizes: image, kernel, result, stride, padding and dilation of three axes
// each. channels and out: of a group. split: columns of a block; 0: what convolution_split_columns says.
template <class T>
void sampled(const T* x, const int64_t* state, const int64_t* sizes, T* dy, int64_t batch, int64_t groups,
             int64_t channels, int64_t out, int64_t transposed, int64_t k, int64_t first, int64_t distribution,
             int64_t offset, int64_t add, int64_t split) {
  using C = typename Compute<T>::type;
  SampledConvolution<T> p{};
  p.x = x, p.batch = batch, p.groups = groups, p.channels = static_cast<int>(channels), p.out = out, p.k = k;
  p.transposed = transposed != 0;
  Axes* const axes[] = {&p.image, &p.kernel, &p.result, &p.stride, &p.padding, &p.dilation};
  for (int j = 0; j < 18; ++j) axes[j / 3]->at[j % 3] = static_cast<int>(sizes[j]);
  p.state = state, p.first = first, p.offset = offset, p.dy = dy, p.add = add != 0;
  p.split_columns = split ? split : convolution_split_columns(p, distribution);
  const int64_t splits = ceil_div(p.columns(), p.split_columns);
  std::vector<C> partials(splits > 1 ? splits * k * p.outputs() * p.rows() : 0, static_cast<C>(NAN));
  if (splits > 1) p.partials = partials.data();
  launch_sampled_convolution(p, distribution, nullptr);
}

}  // namespace

EXPORTED(quotients)(const int64_t* numbers, int64_t* found, int64_t count, int64_t by) {
  const Divisor divisor(static_cast<int>(by));
  for (int64_t j = 0; j < count; ++j) found[j] = divisor.quotient(static_cast<uint32_t>(numbers[j]));
}

#define FROG_EXPORT(name, T)                                                                                       \
  EXPORTED(sampled_convolution_##name)                                                                             \
  (const T* x, const int64_t* state, const int64_t* sizes, T* dy, int64_t batch, int64_t groups, int64_t channels, \
   int64_t out, int64_t transposed, int64_t k, int64_t first, int64_t distribution, int64_t offset, int64_t add,   \
   int64_t split) {                                                                                                \
    sampled<T>(x, state, sizes, dy, batch, groups, channels, out, transposed, k, first, distribution, offset, add, \
               split);                                                                                             \
  }

FROG_EXPORT(float32, float)
FROG_EXPORT(float64, double)
FROG_EXPORT(bfloat16, bf16)
FROG_EXPORT(float16, fp16)
