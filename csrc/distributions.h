// How Philox words become tangent elements. Plain C++ shared by host and device code; the SIMD twins in csrc/cpu/simd
// follow it operation by operation, so every instruction set and device draws the same bits.
//
// counter = (call index low, call index high, tangent index, step), key = seed.
//
// Normal: one call gives 8 elements, one word per Box-Muller pair. Of a word, bits 8..31 are the radius (midpoints of
// 2^23 equal cells of (0, 1)), bits 1..15 the angle within the right half-circle, bit 0 the sign of the cosine.
// Bits 9..15 serve both as low bits of the radius and high bits of the angle; the pair is still equidistributed over
// 2^16 radii x 2^16 angles, which no moment can tell from a Gaussian pair, and it halves the price of a draw. |element|
// <= 5.77.
//   Eight calls make a group of 64 elements: word w of call c holds elements 32 (w / 2) + 16 (c % 2) + 4 (c / 2) + 2 (w
//   % 2) and the next one. The interleaving is what 512-bit registers produce without a shuffle; a GPU thread with one
//   call writes two aligned float4.
//
// Rademacher: one call gives 128 elements, one bit each; a set bit is -1.
//   Eight calls make a group of 1024 elements: element e is bit e % 32 of word 2 (e / 512) + (e / 32) % 2 of call (e /
//   64) % 8.
#pragma once

#include <cmath>
#include <cstring>

#include "philox.h"

namespace frog {

enum Distribution : int64_t { kNormal = 0, kRademacher = 1, kStandardBasis = 2 };

constexpr int64_t kNormalGroup = 64;
constexpr int64_t kRademacherGroup = 1024;
constexpr int64_t kCallsPerGroup = 8;

// r^2 = -2 ln(u) for u = m 2^(e - 24), m in [1, 2): (23 - e) 2 ln 2 + (2 - m) P(2 - m). The factor (2 - m) keeps it >=
// 0 and relatively exact as u -> 1. 2 ln 2 is rounded to 19 bits so that its multiples up to 31 are exact. P is a
// minimax fit, relative error 1.0e-6.
constexpr float kTwoLn2 = 363409.0f / 262144.0f;
constexpr float kLogP[7] = {1.0000009536743164f,   0.24990837275981903f,   0.08472778648138046f, 0.02344142645597458f,
                            0.032671794295310974f, -0.019935235381126404f, 0.015477905049920082f};
// sin(x pi/2) / x and cos(x pi/2) as polynomials in x^2 on [-1, 1]; minimax fits, errors 9.4e-7 and 4.7e-8.
constexpr float kSinP[4] = {1.5707948207855225f, -0.645920991897583f, 0.07948765158653259f, -0.004362467210739851f};
constexpr float kCosP[5] = {0.9999999403953552f, -1.2336982488632202f, 0.2536507546901703f, -0.020810626447200775f,
                            0.0008581903530284762f};

FROG_HD uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

FROG_HD float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

FROG_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// The correctly rounded root of a normal x. What __fsqrt_rn does for such x, without its branch for others, which would
// keep the pairs of a call from being computed side by side.
FROG_HD float round_sqrt(float x) {
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  const float root = __fmul_rn(x, inverse), half = __fmul_rn(inverse, 0.5f);
  return __fmaf_rn(__fmaf_rn(-root, root, x), half, root);
#else
  return std::sqrt(x);
#endif
}

// One Box-Muller pair from one word.
FROG_HD void normal_pair(uint32_t word, float* first, float* second) {
  // device code has constants of its own, not the arrays above
  constexpr float log_p[7] = {kLogP[0], kLogP[1], kLogP[2], kLogP[3], kLogP[4], kLogP[5], kLogP[6]};
  constexpr float sin_p[4] = {kSinP[0], kSinP[1], kSinP[2], kSinP[3]};
  constexpr float cos_p[5] = {kCosP[0], kCosP[1], kCosP[2], kCosP[3], kCosP[4]};
  const uint32_t bits = float_bits(static_cast<float>((word >> 8) | 1u));  // exact: at most 24 bits
  const float octaves = static_cast<float>(150 - static_cast<int>(bits >> 23));
  const float t = 2.0f - bits_float((bits & 0x007FFFFFu) | 0x3F800000u);
  float p = log_p[6];
  for (int j = 5; j >= 0; --j) p = fused(p, t, log_p[j]);
  const float radius = round_sqrt(fused(t, p, octaves * kTwoLn2));
  // 2^23 + (the odd number of bits 1..15) as a float, then mapped to (-1, 1)
  const float x = fused(bits_float((word & 0x0000FFFFu) | 0x4B000001u), 1.0f / 32768.0f, -257.0f);
  const float z = x * x;
  float s = sin_p[3];
  for (int j = 2; j >= 0; --j) s = fused(s, z, sin_p[j]);
  float c = cos_p[4];
  for (int j = 3; j >= 0; --j) c = fused(c, z, cos_p[j]);
  *first = bits_float(float_bits(radius * c) ^ (word << 31));
  *second = (radius * x) * s;
}

FROG_HD PhiloxWords tangent_words(PhiloxKey key, uint32_t step, uint32_t tangent, uint64_t call) {
  return philox4x32_10({{static_cast<uint32_t>(call), static_cast<uint32_t>(call >> 32), tangent, step}}, key);
}

// Element j of a normal tangent (one element: for tests and for ragged edges, not for bulk drawing).
FROG_HD float normal_element(PhiloxKey key, uint32_t step, uint32_t tangent, uint64_t j) {
  const uint32_t e = static_cast<uint32_t>(j % kNormalGroup);
  const uint64_t call = j / kNormalGroup * kCallsPerGroup + 2 * ((e >> 2) & 3) + ((e >> 4) & 1);
  const PhiloxWords words = tangent_words(key, step, tangent, call);
  float pair[2];
  normal_pair(words.w[2 * (e >> 5) + ((e >> 1) & 1)], &pair[0], &pair[1]);
  return pair[e & 1];
}

FROG_HD float rademacher_element(PhiloxKey key, uint32_t step, uint32_t tangent, uint64_t j) {
  const uint32_t e = static_cast<uint32_t>(j % kRademacherGroup);
  const uint64_t call = j / kRademacherGroup * kCallsPerGroup + ((e >> 6) & 7);
  const PhiloxWords words = tangent_words(key, step, tangent, call);
  return (words.w[2 * (e >> 9) + ((e >> 5) & 1)] >> (e & 31)) & 1u ? -1.0f : 1.0f;
}

}  // namespace frog
