// What the elementary functions need beyond isa_avx512.h: arithmetic, comparisons, rounding, parts of a vector.
#pragma once

namespace frog::avx512 {

using M32 = __mmask16;
using M64 = __mmask8;

inline F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
// a > b ? a : b and a < b ? a : b, so that a NaN in the second argument passes
inline F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
inline M32 operator<(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline M32 operator<=(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ); }
inline F32 select(M32 m, F32 yes, F32 no) { return {_mm512_mask_blend_ps(m, no.v, yes.v)}; }
inline F32 round_even(F32 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
/// a 2^n for whole n in [-150, 129]
inline F32 scale_by_power(F32 a, F32 n) { return {_mm512_scalef_ps(a.v, n.v)}; }
/// |magnitude| with the sign of `sign`
inline F32 with_sign(F32 magnitude, F32 sign) {
  const __m512 mask = _mm512_castsi512_ps(_mm512_set1_epi32(INT32_MIN));
  return {_mm512_or_ps(_mm512_andnot_ps(mask, magnitude.v), _mm512_and_ps(mask, sign.v))};
}
inline M32 first_lanes32(int64_t n) { return static_cast<M32>((1u << n) - 1); }
inline F32 load_part(const float* p, int64_t n, F32 rest) {
  return {_mm512_mask_loadu_ps(rest.v, first_lanes32(n), p)};
}
inline void store_part(F32 a, float* p, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes32(n), a.v); }

inline F64 operator+(F64 a, F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
inline F64 operator-(F64 a, F64 b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline F64 operator*(F64 a, F64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline F64 operator/(F64 a, F64 b) { return {_mm512_div_pd(a.v, b.v)}; }
inline F64 max(F64 a, F64 b) { return {_mm512_max_pd(a.v, b.v)}; }
inline F64 min(F64 a, F64 b) { return {_mm512_min_pd(a.v, b.v)}; }
inline F64 abs(F64 a) { return {_mm512_abs_pd(a.v)}; }
inline M64 operator<(F64 a, F64 b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ); }
inline M64 operator<=(F64 a, F64 b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_LE_OQ); }
inline F64 select(M64 m, F64 yes, F64 no) { return {_mm512_mask_blend_pd(m, no.v, yes.v)}; }
inline F64 load_part(const double* p, int64_t n, F64 rest) {
  return {_mm512_mask_loadu_pd(rest.v, static_cast<M64>((1u << n) - 1), p)};
}
inline void store_part(F64 a, double* p, int64_t n) { _mm512_mask_storeu_pd(p, static_cast<M64>((1u << n) - 1), a.v); }

#define FROG_HALF_CONVERSION 1
constexpr int64_t kHalfLanes = 16;
inline void widen_half_lanes(const uint16_t* from, float* to) {
  _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
inline void narrow_half_lanes(const float* from, uint16_t* to) {
  const __m256i half = _mm512_cvtps_ph(_mm512_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
}

}  // namespace frog::avx512
