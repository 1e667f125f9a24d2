// What the elementary functions need beyond isa_avx2.h: arithmetic, comparisons, rounding, parts of a vector.
#pragma once

namespace frog::avx2 {

struct M32 {
  __m256 v;
};
struct M64 {
  __m256d v;
};

inline F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
// a > b ? a : b and a < b ? a : b, so that a NaN in the second argument passes
inline F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F32 abs(F32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline M32 operator<(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
inline M32 operator<=(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
inline F32 select(M32 m, F32 yes, F32 no) { return {_mm256_blendv_ps(no.v, yes.v, m.v)}; }
inline F32 round_even(F32 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
/// a 2^n for whole n in [-150, 129]; in two steps, because 2^n alone may be out of range
inline F32 scale_by_power(F32 a, F32 n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second))};
}
/// |magnitude| with the sign of `sign`
inline F32 with_sign(F32 magnitude, F32 sign) {
  const __m256 mask = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(mask, magnitude.v), _mm256_and_ps(mask, sign.v))};
}
inline F32 load_part(const float* p, int64_t n, F32 rest) {
  float whole[F32::kWidth];
  rest.store(whole);
  for (int64_t j = 0; j < n; ++j) whole[j] = p[j];
  return F32::load(whole);
}
inline void store_part(F32 a, float* p, int64_t n) {
  float whole[F32::kWidth];
  a.store(whole);
  for (int64_t j = 0; j < n; ++j) p[j] = whole[j];
}

inline F64 operator+(F64 a, F64 b) { return {_mm256_add_pd(a.v, b.v)}; }
inline F64 operator-(F64 a, F64 b) { return {_mm256_sub_pd(a.v, b.v)}; }
inline F64 operator*(F64 a, F64 b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline F64 operator/(F64 a, F64 b) { return {_mm256_div_pd(a.v, b.v)}; }
inline F64 max(F64 a, F64 b) { return {_mm256_max_pd(a.v, b.v)}; }
inline F64 min(F64 a, F64 b) { return {_mm256_min_pd(a.v, b.v)}; }
inline F64 abs(F64 a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }
inline M64 operator<(F64 a, F64 b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ)}; }
inline M64 operator<=(F64 a, F64 b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_LE_OQ)}; }
inline F64 select(M64 m, F64 yes, F64 no) { return {_mm256_blendv_pd(no.v, yes.v, m.v)}; }
inline F64 load_part(const double* p, int64_t n, F64 rest) {
  double whole[F64::kWidth];
  rest.store(whole);
  for (int64_t j = 0; j < n; ++j) whole[j] = p[j];
  return F64::load(whole);
}
inline void store_part(F64 a, double* p, int64_t n) {
  double whole[F64::kWidth];
  a.store(whole);
  for (int64_t j = 0; j < n; ++j) p[j] = whole[j];
}

#define FROG_HALF_CONVERSION 1
constexpr int64_t kHalfLanes = 8;
inline void widen_half_lanes(const uint16_t* from, float* to) {
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline void narrow_half_lanes(const float* from, uint16_t* to) {
  const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half);
}

}  // namespace frog::avx2
