// AVX-512 vectors, and the normal and Rademacher groups on them. Included after the target pragma.
#pragma once

namespace frog::avx512 {

struct F32 {
  static constexpr int kWidth = 16;
  using Scalar = float;
  __m512 v;
  static F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static F32 set(float x) { return {_mm512_set1_ps(x)}; }
  static F32 zero() { return {_mm512_setzero_ps()}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  float sum() const { return _mm512_reduce_add_ps(v); }
};
struct F64 {
  static constexpr int kWidth = 8;
  using Scalar = double;
  __m512d v;
  static F64 load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static F64 set(double x) { return {_mm512_set1_pd(x)}; }
  static F64 zero() { return {_mm512_setzero_pd()}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  double sum() const { return _mm512_reduce_add_pd(v); }
};
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F64 fma(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
constexpr int kTileVectors = 4;  // 6 rows x 4 vectors of accumulators, 4 of x, 1 broadcast: 29 of 32 registers

// r^2 as in distributions.h, in sixteen lanes; getexp and getmant give the exponent and the mantissa in [1, 2) exactly.
// The word keeps its upper 24 bits in place, so the exponent is 8 larger than in the scalar code.
inline void normal_pairs(__m512i word, __m512* first, __m512* second) {
  // (word & ~0xFF) | 0x100
  const __m512i cell = _mm512_ternarylogic_epi32(word, _mm512_set1_epi32(~0xFF), _mm512_set1_epi32(0x100), 0xEA);
  const __m512 u = _mm512_cvtepu32_ps(cell);
  const __m512 e = _mm512_getexp_ps(u);
  const __m512 t = _mm512_sub_ps(_mm512_set1_ps(2.0f), _mm512_getmant_ps(u, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src));
  __m512 p = _mm512_set1_ps(kLogP[6]);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(kLogP[5]));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(kLogP[4]));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(kLogP[3]));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(kLogP[2]));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(kLogP[1]));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(kLogP[0]));
  // (31 - e) 2 ln 2 is exact for every e, so one fused step equals the scalar product
  const __m512 octaves = _mm512_fnmadd_ps(e, _mm512_set1_ps(kTwoLn2), _mm512_set1_ps(31.0f * kTwoLn2));
  const __m512 radius = _mm512_sqrt_ps(_mm512_fmadd_ps(t, p, octaves));
  // (word & 0xFFFF) | 0x4B000001
  const __m512i angle = _mm512_ternarylogic_epi32(word, _mm512_set1_epi32(0xFFFF), _mm512_set1_epi32(0x4B000001), 0xEA);
  const __m512 x =
      _mm512_fmadd_ps(_mm512_castsi512_ps(angle), _mm512_set1_ps(1.0f / 32768.0f), _mm512_set1_ps(-257.0f));
  const __m512 z = _mm512_mul_ps(x, x);
  __m512 s = _mm512_set1_ps(kSinP[3]);
  s = _mm512_fmadd_ps(s, z, _mm512_set1_ps(kSinP[2]));
  s = _mm512_fmadd_ps(s, z, _mm512_set1_ps(kSinP[1]));
  s = _mm512_fmadd_ps(s, z, _mm512_set1_ps(kSinP[0]));
  __m512 c = _mm512_set1_ps(kCosP[4]);
  c = _mm512_fmadd_ps(c, z, _mm512_set1_ps(kCosP[3]));
  c = _mm512_fmadd_ps(c, z, _mm512_set1_ps(kCosP[2]));
  c = _mm512_fmadd_ps(c, z, _mm512_set1_ps(kCosP[1]));
  c = _mm512_fmadd_ps(c, z, _mm512_set1_ps(kCosP[0]));
  const __m512i sign = _mm512_slli_epi32(word, 31);
  *first = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(_mm512_mul_ps(radius, c)), sign));
  *second = _mm512_mul_ps(_mm512_mul_ps(radius, x), s);
}

// Eight Philox calls, one in each 64-bit lane. Only the low half of a lane counts: vpmuludq ignores the high half, so
// the 64-bit product itself serves as its own low word, and one shift gives the high word.
struct PhiloxGroup {
  __m512i c2_1, c3_1, q1;  // after round 1, and the tangent-independent product of round 2

  // What the tangents of one group share: the first round and half of the second do not see the tangent index.
  void start(const Schedule& s, uint64_t group) {
    const __m512i lane = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i call = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(group * kCallsPerGroup)), lane);
    c3_1 = _mm512_mul_epu32(_mm512_set1_epi64(kPhiloxM0), call);
    c2_1 = _mm512_xor_si512(_mm512_srli_epi64(c3_1, 32), _mm512_set1_epi64(s.step ^ s.k1[0]));
    q1 = _mm512_mul_epu32(_mm512_set1_epi64(kPhiloxM1), c2_1);
    call_high = static_cast<uint32_t>((group * kCallsPerGroup) >> 32);
  }
  uint32_t call_high;

  // Words 0 and 1 (w01) and 2 and 3 (w23) of the eight calls, interleaved: lane 2 l and 2 l + 1 belong to call l.
  void words(const Schedule& s, uint32_t tangent, __m512i* w01, __m512i* w23) const {
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * tangent;
    const uint32_t c0_1 = static_cast<uint32_t>(p1 >> 32) ^ call_high ^ s.k0[0];
    const uint64_t q0 = static_cast<uint64_t>(kPhiloxM0) * c0_1;
    __m512i c0 = _mm512_xor_si512(_mm512_srli_epi64(q1, 32), _mm512_set1_epi64(static_cast<uint32_t>(p1) ^ s.k0[1]));
    __m512i c1 = q1;
    __m512i c2 = _mm512_xor_si512(c3_1, _mm512_set1_epi64(static_cast<uint32_t>(q0 >> 32) ^ s.k1[1]));
    __m512i c3 = _mm512_set1_epi64(static_cast<uint32_t>(q0));
    const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
#pragma GCC unroll 8
    for (int round = 2; round < kPhiloxRounds; ++round) {
      const __m512i p0 = _mm512_mul_epu32(m0, c0);
      const __m512i p1v = _mm512_mul_epu32(m1, c2);
      c0 = _mm512_ternarylogic_epi32(_mm512_srli_epi64(p1v, 32), c1, _mm512_set1_epi64(s.k0[round]), 0x96);
      c2 = _mm512_ternarylogic_epi32(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(s.k1[round]), 0x96);
      c1 = p1v;
      c3 = p0;
    }
    *w01 = _mm512_mask_shuffle_epi32(c0, 0xAAAA, c1, _MM_PERM_CCAA);
    *w23 = _mm512_mask_shuffle_epi32(c2, 0xAAAA, c3, _MM_PERM_CCAA);
  }
};

struct NormalGroup {
  PhiloxGroup philox;
  void start(const Schedule& s, uint64_t group) { philox.start(s, group); }
  // The 64 elements of the group for one tangent, in order.
  void draw(const Schedule& s, uint32_t tangent, F32 out[4]) const {
    __m512i w01, w23;
    philox.words(s, tangent, &w01, &w23);
    __m512 a, b;
    normal_pairs(w01, &a, &b);
    out[0].v = _mm512_unpacklo_ps(a, b);
    out[1].v = _mm512_unpackhi_ps(a, b);
    normal_pairs(w23, &a, &b);
    out[2].v = _mm512_unpacklo_ps(a, b);
    out[3].v = _mm512_unpackhi_ps(a, b);
  }
};

struct RademacherGroup {
  PhiloxGroup philox;
  void start(const Schedule& s, uint64_t group) { philox.start(s, group); }
  // The 1024 sign bits of the group for one tangent, in order.
  void bits(const Schedule& s, uint32_t tangent, uint32_t out[32]) const {
    __m512i w01, w23;
    philox.words(s, tangent, &w01, &w23);
    _mm512_storeu_si512(out, w01);
    _mm512_storeu_si512(out + 16, w23);
  }
};

// +1 or -1 for the sixteen bits from bit `at` (a multiple of 16).
inline F32 signs(const uint32_t* bits, int64_t at) {
  const __mmask16 mask = static_cast<__mmask16>(bits[at / 32] >> (at % 32));
  return {_mm512_mask_blend_ps(mask, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f))};
}

}  // namespace frog::avx512
