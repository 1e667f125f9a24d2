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
inline F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F64 fma(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
constexpr int kTileVectors = 4;  // 6 rows x 4 vectors of accumulators, 4 of x, 1 broadcast: 29 of 32 registers

inline __m512 low_pairs(__m512 x, __m512 y) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
}
inline __m512 high_pairs(__m512 x, __m512 y) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
}

// to[c * to_ld + r] = from[r * ld + c] for r, c < 16: pairs of elements, then of pairs, then of quarters of a register
constexpr bool kTransposesFloats = true;
inline void transpose_floats(const float* from, int64_t ld, float* to, int64_t to_ld) {
  __m512 a[16], b[16];
  for (int r = 0; r < 16; ++r) a[r] = _mm512_loadu_ps(from + r * ld);
  for (int r = 0; r < 16; r += 2) {
    b[r] = _mm512_unpacklo_ps(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_ps(a[r], a[r + 1]);
  }
  for (int r = 0; r < 16; r += 4) {  // a[r + c]: columns c, c + 4, c + 8, c + 12 of rows r .. r + 3
    a[r] = low_pairs(b[r], b[r + 2]);
    a[r + 1] = high_pairs(b[r], b[r + 2]);
    a[r + 2] = low_pairs(b[r + 1], b[r + 3]);
    a[r + 3] = high_pairs(b[r + 1], b[r + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512 even_low = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88);  // columns c and c + 8 of rows 0 .. 7
    const __m512 odd_low = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xDD);
    const __m512 even_high = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xDD);
    _mm512_storeu_ps(to + c * to_ld, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
    _mm512_storeu_ps(to + (c + 4) * to_ld, _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_ps(to + (c + 8) * to_ld, _mm512_shuffle_f32x4(even_low, even_high, 0xDD));
    _mm512_storeu_ps(to + (c + 12) * to_ld, _mm512_shuffle_f32x4(odd_low, odd_high, 0xDD));
  }
}

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
  uint32_t call_high;

  // What the tangents of one group share: the first round and half of the second do not see the tangent index.
  void start(const Schedule& s, uint64_t group) {
    const __m512i lane = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i call = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(group * kCallsPerGroup)), lane);
    c3_1 = _mm512_mul_epu32(_mm512_set1_epi64(kPhiloxM0), call);
    c2_1 = _mm512_xor_si512(_mm512_srli_epi64(c3_1, 32), _mm512_set1_epi64(s.step ^ s.k1[0]));
    q1 = _mm512_mul_epu32(_mm512_set1_epi64(kPhiloxM1), c2_1);
    call_high = static_cast<uint32_t>((group * kCallsPerGroup) >> 32);
  }

  // out[n] receives the words of tangent + n. N chains of rounds run side by side: one alone waits for its own
  // products.
  template <int N>
  void words(const Schedule& s, uint32_t tangent, GroupWords* out) const {
    __m512i c0[N], c1[N], c2[N], c3[N];
    const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * (tangent + static_cast<uint32_t>(n));
      const uint32_t c0_1 = static_cast<uint32_t>(p1 >> 32) ^ call_high ^ s.k0[0];
      const uint64_t q0 = static_cast<uint64_t>(kPhiloxM0) * c0_1;
      c0[n] = _mm512_xor_si512(_mm512_srli_epi64(q1, 32), _mm512_set1_epi64(static_cast<uint32_t>(p1) ^ s.k0[1]));
      c1[n] = q1;
      c2[n] = _mm512_xor_si512(c3_1, _mm512_set1_epi64(static_cast<uint32_t>(q0 >> 32) ^ s.k1[1]));
      c3[n] = _mm512_set1_epi64(static_cast<uint32_t>(q0));
    }
#pragma GCC unroll 8
    for (int round = 2; round < kPhiloxRounds; ++round) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const __m512i p0 = _mm512_mul_epu32(m0, c0[n]);
        const __m512i p1 = _mm512_mul_epu32(m1, c2[n]);
        c0[n] = _mm512_ternarylogic_epi32(_mm512_srli_epi64(p1, 32), c1[n], _mm512_set1_epi64(s.k0[round]), 0x96);
        c2[n] = _mm512_ternarylogic_epi32(_mm512_srli_epi64(p0, 32), c3[n], _mm512_set1_epi64(s.k1[round]), 0x96);
        c1[n] = p1;
        c3[n] = p0;
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      _mm512_store_si512(out[n].w, _mm512_mask_shuffle_epi32(c0[n], 0xAAAA, c1[n], _MM_PERM_CCAA));
      _mm512_store_si512(out[n].w + 16, _mm512_mask_shuffle_epi32(c2[n], 0xAAAA, c3[n], _MM_PERM_CCAA));
    }
  }
};

// The 64 normal elements of a group, in order.
inline void normals(const GroupWords& words, F32 out[4]) {
  __m512 a, b;
  normal_pairs(_mm512_load_si512(words.w), &a, &b);
  out[0].v = _mm512_unpacklo_ps(a, b);
  out[1].v = _mm512_unpackhi_ps(a, b);
  normal_pairs(_mm512_load_si512(words.w + 16), &a, &b);
  out[2].v = _mm512_unpacklo_ps(a, b);
  out[3].v = _mm512_unpackhi_ps(a, b);
}

// +c or -c by the sixteen bits from bit `at` (a multiple of 16). Shifts, because moving bits into a mask register takes
// longer.
inline F32 signed_by(const GroupWords& words, int64_t at, F32 c) {
  const __m512i spread = _mm512_set1_epi32(static_cast<int>(words.w[at / 32]));
  const __m512i up = _mm512_sub_epi32(_mm512_set_epi32(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31),
                                      _mm512_set1_epi32(at % 32));
  const __m512i top = _mm512_sllv_epi32(spread, up);
  // (top & sign) ^ c
  return {_mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(top, _mm512_set1_epi32(INT32_MIN), _mm512_castps_si512(c.v), 0x6A))};
}

// +1 or -1 for the 32 bits of a word. Half-width stores, which this loop is bound by, are the faster ones (Zen 4).
inline void store_signs(uint32_t word, float* out) {
  const __m256i spread = _mm256_set1_epi32(static_cast<int>(word));
  const __m256i sign = _mm256_set1_epi32(INT32_MIN), one = _mm256_castps_si256(_mm256_set1_ps(1.0f));
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m256i up = _mm256_sub_epi32(_mm256_set_epi32(24, 25, 26, 27, 28, 29, 30, 31), _mm256_set1_epi32(8 * j));
    const __m256i top = _mm256_sllv_epi32(spread, up);
    // (top & sign) | one
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8 * j), _mm256_ternarylogic_epi32(top, sign, one, 0xEA));
  }
}

}  // namespace frog::avx512
