// Tensor-core steps, one function for each shape: mma.sync and ldmatrix on the device, an exchange over the 32 lanes of
// the warp on the host. All lanes of a warp must call them together.
//
// Fragments of m16n8k16, D [16, 8] += A [16, 16] B [16, 8], with g = lane / 4 and t = lane % 4; a register of A or B
// holds two neighbouring elements along k, the first in the low half:
//   a[0]  row g,      k 2t and 2t + 1      a[2]  row g,      k 2t + 8 and 2t + 9
//   a[1]  row g + 8,  k 2t and 2t + 1      a[3]  row g + 8,  k 2t + 8 and 2t + 9
//   b[0]  column g,   k 2t and 2t + 1      b[1]  column g,   k 2t + 8 and 2t + 9
//   d[0], d[1]  row g, columns 2t and 2t + 1;  d[2], d[3]  row g + 8
//
// Products are exact; a sum is not rounded to nearest but cut off, on current GPUs at float32's last bit or slightly
// below it. Long float32 sums drift towards zero by that, so whoever needs float32 accuracy adds up short sums
// elsewhere. The host cuts off as well.
#pragma once

#include "types.cuh"

namespace frog {

#if defined(__CUDACC__)

/// d += a b. E: bf16 or fp16.
template <class E>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<fp16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// Four 8 x 8 matrices of 16-bit elements from shared memory. Lane l gives the address of row l % 8 of matrix l / 8, 16
/// bytes, aligned; out[j] is elements 2t and 2t + 1 of row g of matrix j.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(from)
               : "memory");
}

#else

template <class E>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  const uint32_t own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const unsigned char* slots = cuda_on_cpu::exchange(kFullWarp, own, sizeof(own), "mma_m16n8k16", line);
  const auto element = [&](int lane, int slot, int half) {
    uint32_t pair;
    std::memcpy(&pair, slots + lane * cuda_on_cpu::kSlotBytes + slot * sizeof(uint32_t), sizeof(pair));
    return double{widen(E{static_cast<uint16_t>(pair >> (16 * half))})};
  };
  const int lane = static_cast<int>(cuda_on_cpu::lane()), g = lane / 4, t = lane % 4;
  for (int j = 0; j < 4; ++j) {
    double sum = d[j];
    for (int k = 0; k < 16; ++k) {
      const int upper = k / 8, owner = k % 8 / 2;  // which register, and which of the four lanes of a row
      sum += element(4 * g + owner, 2 * upper + j / 2, k % 2) * element(4 * (2 * t + j % 2) + owner, 4 + upper, k % 2);
    }
    d[j] = static_cast<float>(sum);
    if (std::fabs(double{d[j]}) > std::fabs(sum) && std::isfinite(sum)) d[j] = std::nextafter(d[j], 0.0f);
  }
}

inline void load_matrices(uint32_t (&out)[4], const void* row, int line = __builtin_LINE()) {
  if (reinterpret_cast<uintptr_t>(row) % 16) cuda_on_cpu::fail("load_matrices in line %d: a row is not aligned", line);
  const unsigned char* slots = cuda_on_cpu::exchange(kFullWarp, &row, sizeof(row), "load_matrices", line);
  const int lane = static_cast<int>(cuda_on_cpu::lane());
  for (int j = 0; j < 4; ++j) {
    const char* from = cuda_on_cpu::from_lane<const char*>(slots, 8 * j + lane / 4);
    std::memcpy(&out[j], from + lane % 4 * sizeof(uint32_t), sizeof(uint32_t));
  }
}

#endif

}  // namespace frog
