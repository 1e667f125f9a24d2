// Kernels with a planted fault each, and their sound twins: what the emulation must object to, and what it must not.
#include "cuda/kernels/types.cuh"
#include "exported.h"

namespace kernels {

constexpr int kThreads = 96;

// out[i] = the sum of x over the block, for every thread i
__global__ static void block_sum(const float* x, float* out, bool barrier) {
  FROG_SHARED(float, sums);
  const int t = static_cast<int>(threadIdx.x);
  float sum = x[t];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(frog::kFullWarp, sum, step);
  if (t % 32 == 0) sums[t / 32] = sum;
  if (barrier) __syncthreads();
  out[t] = sums[0] + sums[1] + sums[2];
}

__global__ static void past_the_end(float* out, int elements) {
  FROG_SHARED(float, shared);
  shared[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = shared[elements - 1];
}

__global__ static void divergent(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[threadIdx.x] = 1.0f;
  } else {
    __syncthreads();
    out[threadIdx.x] = 2.0f;
  }
}

__global__ static void some_wait(float* out) {
  if (threadIdx.x >= 64 && threadIdx.x != 95) __syncwarp();  // lane 31 of the last warp is not there
  __syncthreads();
  out[threadIdx.x] = 0.0f;
}

__global__ static void leaves_early(float* out) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  out[threadIdx.x] = 1.0f;
}

__global__ static void half_a_warp(float* out, bool sound) {
  float value = static_cast<float>(threadIdx.x);
  if (threadIdx.x % 32 < 16) value = __shfl_xor_sync(sound ? 0x0000FFFFu : frog::kFullWarp, value, 1);
  out[threadIdx.x] = value;
}

__global__ static void packed(const float* x, float* out) {
  using Pack = frog::Pack<float, 4>;
  reinterpret_cast<Pack*>(out)[threadIdx.x] = reinterpret_cast<const Pack*>(x)[threadIdx.x];
}

// A copy from global to shared memory, read with or without waiting for it.
__global__ static void copied(const float* x, float* out, bool wait) {
  FROG_SHARED(float, shared);
  frog::copy_async16(shared + 4 * threadIdx.x, x + 4 * threadIdx.x, threadIdx.x % 2 == 0);
  frog::copy_async_commit();
  if (wait) frog::copy_async_wait<0>();
  __syncthreads();
  for (unsigned j = threadIdx.x; j < 4 * blockDim.x; j += blockDim.x) out[j] = shared[j];
}

__global__ static void indices(int64_t* out) {
  const int64_t block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * static_cast<int64_t>(blockIdx.z));
  const int64_t thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * static_cast<int64_t>(threadIdx.z));
  const int64_t size = static_cast<int64_t>(blockDim.x) * blockDim.y * blockDim.z;
  out[block * size + thread] += block * size + thread + 1;
}

__global__ static void convert(const uint16_t* half, const uint16_t* brain, float* halves, float* brains,
                               const float* x, uint16_t* to_half, uint16_t* to_brain) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  halves[i] = frog::widen(frog::fp16{half[i]});
  brains[i] = frog::widen(frog::bf16{brain[i]});
  to_half[i] = frog::narrow<frog::fp16>(x[i]).bits;
  to_brain[i] = frog::narrow<frog::bf16>(x[i]).bits;
}

__global__ static void votes(int64_t* out) {
  const bool odd = threadIdx.x % 2;
  out[threadIdx.x] = (__any_sync(frog::kFullWarp, odd) ? 1 : 0) + (__all_sync(frog::kFullWarp, odd) ? 2 : 0) +
                     4 * static_cast<int64_t>(__ballot_sync(frog::kFullWarp, odd));
}

}  // namespace kernels

using frog::launch;

EXPORTED(block_sum)(const float* x, float* out, int64_t barrier) {
  launch(kernels::block_sum, dim3(1), dim3(kernels::kThreads), 3 * sizeof(float), nullptr, x, out, barrier != 0);
}
EXPORTED(past_the_end)(float* out, int64_t elements) {
  launch(kernels::past_the_end, dim3(1), dim3(32), 32 * sizeof(float), nullptr, out, static_cast<int>(elements));
}
EXPORTED(divergent)(float* out) { launch(kernels::divergent, dim3(1), dim3(64), 0, nullptr, out); }
EXPORTED(some_wait)(float* out) { launch(kernels::some_wait, dim3(1), dim3(96), 0, nullptr, out); }
EXPORTED(leaves_early)(float* out) { launch(kernels::leaves_early, dim3(1), dim3(32), 0, nullptr, out); }
EXPORTED(half_a_warp)(float* out, int64_t sound) {
  launch(kernels::half_a_warp, dim3(1), dim3(32), 0, nullptr, out, sound != 0);
}
EXPORTED(packed)(const float* x, float* out) { launch(kernels::packed, dim3(1), dim3(8), 0, nullptr, x, out); }
EXPORTED(copied)(const float* x, float* out, int64_t wait) {
  launch(kernels::copied, dim3(1), dim3(64), 256 * sizeof(float), nullptr, x, out, wait != 0);
}
EXPORTED(indices)(int64_t* out) { launch(kernels::indices, dim3(3, 2, 2), dim3(4, 3, 2), 0, nullptr, out); }
EXPORTED(convert)
(const uint16_t* half, const uint16_t* brain, float* halves, float* brains, const float* x, uint16_t* to_half,
 uint16_t* to_brain, int64_t n) {
  launch(kernels::convert, dim3(n / 256), dim3(256), 0, nullptr, half, brain, halves, brains, x, to_half, to_brain);
}
EXPORTED(votes)(int64_t* out) { launch(kernels::votes, dim3(1), dim3(32), 0, nullptr, out); }
EXPORTED(shared_bytes)(float* out, int64_t bytes) {
  launch(kernels::half_a_warp, dim3(1), dim3(32), static_cast<size_t>(bytes), nullptr, out, true);
}
EXPORTED(empty_grid)(float* out) { launch(kernels::divergent, dim3(0), dim3(32), 0, nullptr, out); }
