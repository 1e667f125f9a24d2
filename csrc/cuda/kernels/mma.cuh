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
// Fragments of m8n8k4, float64, and of m8n8k128, bits, D [8, 8] += A [8, k] B [k, 8]:
//   a  row g,  k t, or bits k 32t .. 32t + 31      b  column g, the same k      d[0], d[1]  row g, columns 2t and 2t +
//   1
// so that for B = A^T a lane's a and b are the same.
//
// Products of 16-bit elements are exact; a sum of them is not rounded to nearest but cut off, on current GPUs at
// float32's last bit or slightly below it. Long float32 sums drift towards zero by that, so whoever needs float32
// accuracy adds up short sums elsewhere. The host cuts off as well.
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

/// d += a b in float64.
__device__ __forceinline__ void mma_m8n8k4(double (&d)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};\n"
               : "+d"(d[0]), "+d"(d[1])
               : "d"(a), "d"(b));
}

/// d += the number of bits that are set in both. One instruction on compute capabilities 8.x and 9.0; later ones have
/// none, and ptxas writes four products of bytes instead.
__device__ __forceinline__ void mma_m8n8k128(int (&d)[2], uint32_t a, uint32_t b) {
  asm volatile("mma.sync.aligned.m8n8k128.row.col.s32.b1.b1.s32.and.popc {%0, %1}, {%2}, {%3}, {%0, %1};\n"
               : "+r"(d[0]), "+r"(d[1])
               : "r"(a), "r"(b));
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

/// The same with each matrix transposed: out[j] is column g, rows 2t and 2t + 1 of matrix j. For a B whose rows, along
/// k, lie in shared memory.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
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

namespace detail {
/// Calls step(h, a, b) for the two entries of d and k = 0, 1, 2, 3, with what the lanes of row and column hold.
template <class E, class Step>
void for_each_product(E a, E b, const char* what, int line, const Step& step) {
  struct Pair {
    E a, b;
  };
  const Pair own = {a, b};
  const unsigned char* slots = cuda_on_cpu::exchange(kFullWarp, &own, sizeof(own), what, line);
  const int lane = static_cast<int>(cuda_on_cpu::lane()), g = lane / 4, t = lane % 4;
  for (int h = 0; h < 2; ++h) {
    for (int k = 0; k < 4; ++k) {
      step(h, cuda_on_cpu::from_lane<Pair>(slots, 4 * g + k).a,
           cuda_on_cpu::from_lane<Pair>(slots, 4 * (2 * t + h) + k).b);
    }
  }
}
}  // namespace detail

inline void mma_m8n8k4(double (&d)[2], double a, double b, int line = __builtin_LINE()) {
  detail::for_each_product(a, b, "mma_m8n8k4", line, [&](int h, double x, double y) { d[h] = std::fma(x, y, d[h]); });
}

inline void mma_m8n8k128(int (&d)[2], uint32_t a, uint32_t b, int line = __builtin_LINE()) {
  detail::for_each_product(a, b, "mma_m8n8k128", line, [&](int h, uint32_t x, uint32_t y) { d[h] += __popc(x & y); });
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

inline void load_matrices_transposed(uint32_t (&out)[4], const void* row, int line = __builtin_LINE()) {
  if (reinterpret_cast<uintptr_t>(row) % 16)
    cuda_on_cpu::fail("load_matrices_transposed in line %d: a row is not aligned", line);
  const unsigned char* slots = cuda_on_cpu::exchange(kFullWarp, &row, sizeof(row), "load_matrices_transposed", line);
  const int lane = static_cast<int>(cuda_on_cpu::lane());
  for (int j = 0; j < 4; ++j) {
    uint16_t pair[2];
    for (int half = 0; half < 2; ++half) {
      const char* from = cuda_on_cpu::from_lane<const char*>(slots, 8 * j + lane % 4 * 2 + half);
      std::memcpy(&pair[half], from + lane / 4 * sizeof(uint16_t), sizeof(uint16_t));
    }
    out[j] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

#endif

}  // namespace frog
