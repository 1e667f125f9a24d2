// The kernels of sampled_convolution_, apart from convolution.cu so that the two compile side by side.
#include "kernels/convolution.cuh"

namespace frog {

template void launch_sampled_convolution<float>(const SampledConvolution<float>&, int64_t, cudaStream_t);
template void launch_sampled_convolution<double>(const SampledConvolution<double>&, int64_t, cudaStream_t);
template void launch_sampled_convolution<bf16>(const SampledConvolution<bf16>&, int64_t, cudaStream_t);
template void launch_sampled_convolution<fp16>(const SampledConvolution<fp16>&, int64_t, cudaStream_t);

}  // namespace frog
