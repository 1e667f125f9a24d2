// One tensor-core step of a warp, so that its fragments can be compared with a matrix product.
#include "cuda/kernels/mma.cuh"

#include "exported.h"

namespace {

using namespace frog;

// a [16, 16], b [8, 16] (a row for each column of the product), c [16, 8] -> c + a b^T, fragments from global memory
template <class E>
__global__ void one_step(const E* a, const E* b, const float* c, float* out) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto pair = [](const E* at) {
    return static_cast<uint32_t>(at[0].bits) | static_cast<uint32_t>(at[1].bits) << 16;
  };
  const uint32_t rows[4] = {pair(a + g * 16 + 2 * t), pair(a + (g + 8) * 16 + 2 * t), pair(a + g * 16 + 2 * t + 8),
                            pair(a + (g + 8) * 16 + 2 * t + 8)};
  const uint32_t columns[2] = {pair(b + g * 16 + 2 * t), pair(b + g * 16 + 2 * t + 8)};
  const int at[4] = {g * 8 + 2 * t, g * 8 + 2 * t + 1, (g + 8) * 8 + 2 * t, (g + 8) * 8 + 2 * t + 1};
  float d[4];
  for (int j = 0; j < 4; ++j) d[j] = c[at[j]];
  mma_m16n8k16<E>(d, rows, columns);
  for (int j = 0; j < 4; ++j) out[at[j]] = d[j];
}

// a [8, 4], b [8, 4] (a row for each column of the product), c [8, 8] -> c + a b^T
__global__ void one_double_step(const double* a, const double* b, const double* c, double* out) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  double d[2] = {c[g * 8 + 2 * t], c[g * 8 + 2 * t + 1]};
  mma_m8n8k4(d, a[g * 4 + t], b[g * 4 + t]);
  for (int j = 0; j < 2; ++j) out[g * 8 + 2 * t + j] = d[j];
}

// a [8, 4], b [8, 4] words, c [8, 8] -> c + number of bits that a row of a shares with a row of b
__global__ void one_bit_step(const uint32_t* a, const uint32_t* b, const int* c, int* out) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  int d[2] = {c[g * 8 + 2 * t], c[g * 8 + 2 * t + 1]};
  mma_m8n8k128(d, a[g * 4 + t], b[g * 4 + t]);
  for (int j = 0; j < 2; ++j) out[g * 8 + 2 * t + j] = d[j];
}

// from [4, 8, 8] in shared memory -> what each lane receives, [32, 4, 2]
template <bool kTransposed>
__global__ void read_matrices(const uint16_t* from, uint16_t* out) {
  FROG_SHARED(uint16_t, shared);
  for (int j = threadIdx.x; j < 256; j += kWarp) shared[j] = from[j];
  __syncwarp();
  uint32_t registers[4];
  if (kTransposed) {
    load_matrices_transposed(registers, shared + threadIdx.x * 8);
  } else {
    load_matrices(registers, shared + threadIdx.x * 8);
  }
  for (int j = 0; j < 4; ++j) {
    out[threadIdx.x * 8 + 2 * j] = static_cast<uint16_t>(registers[j]);
    out[threadIdx.x * 8 + 2 * j + 1] = static_cast<uint16_t>(registers[j] >> 16);
  }
}

}  // namespace

EXPORTED(step_bf16)(const bf16* a, const bf16* b, const float* c, float* out) {
  launch(one_step<bf16>, dim3(1), dim3(kWarp), 0, nullptr, a, b, c, out);
}
EXPORTED(step_fp16)(const fp16* a, const fp16* b, const float* c, float* out) {
  launch(one_step<fp16>, dim3(1), dim3(kWarp), 0, nullptr, a, b, c, out);
}
EXPORTED(step_double)(const double* a, const double* b, const double* c, double* out) {
  launch(one_double_step, dim3(1), dim3(kWarp), 0, nullptr, a, b, c, out);
}
EXPORTED(step_bits)(const uint32_t* a, const uint32_t* b, const int* c, int* out) {
  launch(one_bit_step, dim3(1), dim3(kWarp), 0, nullptr, a, b, c, out);
}
EXPORTED(matrices)(const uint16_t* from, uint16_t* out) {
  launch(read_matrices<false>, dim3(1), dim3(kWarp), 256 * sizeof(uint16_t), nullptr, from, out);
}
EXPORTED(matrices_transposed)(const uint16_t* from, uint16_t* out) {
  launch(read_matrices<true>, dim3(1), dim3(kWarp), 256 * sizeof(uint16_t), nullptr, from, out);
}
