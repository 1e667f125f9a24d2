// The products with sampled weight tangents of linear.cu.
#include "kernels/linear.cuh"

namespace frog {

template void launch_sampled_product<float>(const SampledProduct<float>&, int64_t, cudaStream_t);
template void launch_sampled_product<double>(const SampledProduct<double>&, int64_t, cudaStream_t);
template void launch_sampled_product<bf16>(const SampledProduct<bf16>&, int64_t, cudaStream_t);
template void launch_sampled_product<fp16>(const SampledProduct<fp16>&, int64_t, cudaStream_t);

}  // namespace frog
