// Element types as kernels see them: 16-bit floats as their bits, so that kernel files need no library header, and
// 16-byte accesses.
#pragma once

#include <cstring>
#include <type_traits>

#include "../../distributions.h"
#include "platform.cuh"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace frog {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

/// The type that sums and functions are computed in.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

template <class T>
__host__ __device__ __forceinline__ typename Compute<T>::type widen(T x) {
  return x;
}
template <>
__host__ __device__ __forceinline__ float widen<bf16>(bf16 x) {
  return bits_float(static_cast<uint32_t>(x.bits) << 16);
}
template <>
__host__ __device__ __forceinline__ float widen<fp16>(fp16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7FFFu;
  if (rest >= 0x7C00u) return bits_float(sign | 0x7F800000u | ((rest & 0x3FFu) << 13));  // infinite or NaN
  if (rest >= 0x400u) return bits_float(sign | ((rest << 13) + 0x38000000u));
  const float small = static_cast<float>(rest) * 5.9604644775390625e-08f;  // subnormal: units of 2^-24
  return bits_float(sign | float_bits(small));
#endif
}

/// Rounds to nearest, ties to even.
template <class T>
__host__ __device__ __forceinline__ T narrow(typename Compute<T>::type x) {
  return x;
}
template <>
__host__ __device__ __forceinline__ bf16 narrow<bf16>(float x) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = float_bits(x);
  if (x != x) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
#endif
}
template <>
__host__ __device__ __forceinline__ fp16 narrow<fp16>(float x) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t bits = float_bits(x), rest = bits & 0x7FFFFFFFu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  if (rest > 0x7F800000u) return {0x7FFF};
  if (rest >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};  // rounds to infinity
  if (rest >= 0x38800000u)
    return {static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xFFFu + ((rest >> 13) & 1u)) >> 13))};
  // subnormal: adding 1/2 puts units of 2^-24 at the end of the significand, rounded as every addition is
  const float shifted = bits_float(rest) + 0.5f;
  return {static_cast<uint16_t>(sign | (float_bits(shifted) - 0x3F000000u))};
#endif
}

/// Two neighbours in one register, the first in the low half.
template <class E>
__host__ __device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t bits;
  if constexpr (std::is_same_v<E, bf16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  }
  return bits;
#else
  return narrow<E>(low).bits | static_cast<uint32_t>(narrow<E>(high).bits) << 16;
#endif
}

/// N elements read or written at once: 16 bytes where N is kPack<T>. Global pointers must then be 16-byte aligned.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};
template <class T>
constexpr int kPack = 16 / sizeof(T);

template <class T>
__host__ __device__ inline bool aligned16(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

}  // namespace frog
