// AVX2 vectors, and the normal and Rademacher groups on them. Included after the target pragma.
#pragma once

namespace frog::avx2 {

struct F32 {
  static constexpr int kWidth = 8;
  using Scalar = float;
  __m256 v;
  static F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static F32 set(float x) { return {_mm256_set1_ps(x)}; }
  static F32 zero() { return {_mm256_setzero_ps()}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  float sum() const {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
  }
};
struct F64 {
  static constexpr int kWidth = 4;
  using Scalar = double;
  __m256d v;
  static F64 load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static F64 set(double x) { return {_mm256_set1_pd(x)}; }
  static F64 zero() { return {_mm256_setzero_pd()}; }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  double sum() const {
    const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
  }
};
inline F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F64 fma(F64 a, F64 b, F64 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
constexpr int kTileVectors = 2;  // 6 rows x 2 vectors of accumulators, 2 of x, 1 broadcast: 15 of 16 registers

inline __m256 low_pairs(__m256 x, __m256 y) {
  return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(x), _mm256_castps_pd(y)));
}
inline __m256 high_pairs(__m256 x, __m256 y) {
  return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(x), _mm256_castps_pd(y)));
}

// to[c * to_ld + r] = from[r * ld + c] for r, c < 8: pairs of elements, then of pairs, then halves of a register
constexpr bool kTransposesFloats = true;
inline void transpose_floats(const float* from, int64_t ld, float* to, int64_t to_ld) {
  __m256 a[8], b[8];
  for (int r = 0; r < 8; ++r) a[r] = _mm256_loadu_ps(from + r * ld);
  for (int r = 0; r < 8; r += 2) {
    b[r] = _mm256_unpacklo_ps(a[r], a[r + 1]);
    b[r + 1] = _mm256_unpackhi_ps(a[r], a[r + 1]);
  }
  for (int r = 0; r < 8; r += 4) {  // a[r + c]: columns c and c + 4 of rows r .. r + 3
    a[r] = low_pairs(b[r], b[r + 2]);
    a[r + 1] = high_pairs(b[r], b[r + 2]);
    a[r + 2] = low_pairs(b[r + 1], b[r + 3]);
    a[r + 3] = high_pairs(b[r + 1], b[r + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(to + c * to_ld, _mm256_permute2f128_ps(a[c], a[4 + c], 0x20));
    _mm256_storeu_ps(to + (c + 4) * to_ld, _mm256_permute2f128_ps(a[c], a[4 + c], 0x31));
  }
}

// Box-Muller as in distributions.h, eight lanes.
inline void normal_pairs(__m256i word, __m256* first, __m256* second) {
  const __m256i cell = _mm256_or_si256(_mm256_srli_epi32(word, 8), _mm256_set1_epi32(1));
  const __m256i bits = _mm256_castps_si256(_mm256_cvtepi32_ps(cell));
  const __m256 octaves = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_set1_epi32(150), _mm256_srli_epi32(bits, 23)));
  const __m256i mantissa =
      _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi32(0x007FFFFF)), _mm256_set1_epi32(0x3F800000));
  const __m256 t = _mm256_sub_ps(_mm256_set1_ps(2.0f), _mm256_castsi256_ps(mantissa));
  __m256 p = _mm256_set1_ps(kLogP[6]);
  for (int j = 5; j >= 0; --j) p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(kLogP[j]));
  const __m256 radius = _mm256_sqrt_ps(_mm256_fmadd_ps(t, p, _mm256_mul_ps(octaves, _mm256_set1_ps(kTwoLn2))));
  const __m256i angle =
      _mm256_or_si256(_mm256_and_si256(word, _mm256_set1_epi32(0xFFFF)), _mm256_set1_epi32(0x4B000001));
  const __m256 x =
      _mm256_fmadd_ps(_mm256_castsi256_ps(angle), _mm256_set1_ps(1.0f / 32768.0f), _mm256_set1_ps(-257.0f));
  const __m256 z = _mm256_mul_ps(x, x);
  __m256 s = _mm256_set1_ps(kSinP[3]);
  for (int j = 2; j >= 0; --j) s = _mm256_fmadd_ps(s, z, _mm256_set1_ps(kSinP[j]));
  __m256 c = _mm256_set1_ps(kCosP[4]);
  for (int j = 3; j >= 0; --j) c = _mm256_fmadd_ps(c, z, _mm256_set1_ps(kCosP[j]));
  *first = _mm256_xor_ps(_mm256_mul_ps(radius, c), _mm256_castsi256_ps(_mm256_slli_epi32(word, 31)));
  *second = _mm256_mul_ps(_mm256_mul_ps(radius, x), s);
}

// Four Philox calls, one in each 64-bit lane; only the low half of a lane counts, as in isa_avx512.h.
inline void philox_words(const Schedule& s, uint64_t call, uint32_t tangent, __m256i* w01, __m256i* w23) {
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(call)), _mm256_set_epi64x(3, 2, 1, 0));
  __m256i c1 = _mm256_set1_epi64x(static_cast<int64_t>(call >> 32));
  __m256i c2 = _mm256_set1_epi64x(tangent);
  __m256i c3 = _mm256_set1_epi64x(s.step);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const __m256i p0 = _mm256_mul_epu32(m0, c0);
    const __m256i p1 = _mm256_mul_epu32(m1, c2);
    c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), _mm256_set1_epi64x(s.k0[round]));
    c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), _mm256_set1_epi64x(s.k1[round]));
    c1 = p1;
    c3 = p0;
  }
  *w01 = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
  *w23 = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
}

struct PhiloxGroup {
  uint64_t call;
  void start(const Schedule&, uint64_t group) { call = group * kCallsPerGroup; }
  // out[n] receives the words of tangent + n.
  template <int N>
  void words(const Schedule& s, uint32_t tangent, GroupWords* out) const {
    for (int n = 0; n < N; ++n) {
      for (int half = 0; half < 2; ++half) {
        __m256i w01, w23;
        philox_words(s, call + 4 * half, tangent + static_cast<uint32_t>(n), &w01, &w23);
        _mm256_store_si256(reinterpret_cast<__m256i*>(out[n].w + 8 * half), w01);
        _mm256_store_si256(reinterpret_cast<__m256i*>(out[n].w + 16 + 8 * half), w23);
      }
    }
  }
};

// The 64 normal elements of a group, in order: calls 0..3 fill the first half of each run of 16, 4..7 the second.
inline void normals(const GroupWords& words, F32 out[8]) {
  for (int quarter = 0; quarter < 4; ++quarter) {
    __m256 a, b;
    normal_pairs(_mm256_load_si256(reinterpret_cast<const __m256i*>(words.w + 8 * quarter)), &a, &b);
    const int at = 4 * (quarter / 2) + quarter % 2;
    out[at].v = _mm256_unpacklo_ps(a, b);
    out[at + 2].v = _mm256_unpackhi_ps(a, b);
  }
}

// +c or -c by the eight bits from bit `at` (a multiple of 8).
inline F32 signed_by(const GroupWords& words, int64_t at, F32 c) {
  const __m256i spread = _mm256_set1_epi32(static_cast<int>(words.w[at / 32] >> (at % 32)));
  const __m256i top = _mm256_sllv_epi32(spread, _mm256_set_epi32(24, 25, 26, 27, 28, 29, 30, 31));
  const __m256i sign = _mm256_and_si256(top, _mm256_set1_epi32(INT32_MIN));
  return {_mm256_xor_ps(c.v, _mm256_castsi256_ps(sign))};
}

// +1 or -1 for the 32 bits of a word.
inline void store_signs(uint32_t word, float* out) {
  const __m256i spread = _mm256_set1_epi32(static_cast<int>(word));
  for (int j = 0; j < 4; ++j) {
    const __m256i up = _mm256_sub_epi32(_mm256_set_epi32(24, 25, 26, 27, 28, 29, 30, 31), _mm256_set1_epi32(8 * j));
    const __m256i sign = _mm256_and_si256(_mm256_sllv_epi32(spread, up), _mm256_set1_epi32(INT32_MIN));
    _mm256_storeu_ps(out + 8 * j, _mm256_or_ps(_mm256_set1_ps(1.0f), _mm256_castsi256_ps(sign)));
  }
}

}  // namespace frog::avx2
