// The tile of products in bfloat16 with sums in float32, by AVX-512 BF16: 64 operations an instruction, twice those of
// a float32 one. choice.h says which machines have use for it. Included after the target pragma.
#pragma once

#if __GNUC__ >= 10
#define FROG_BF16_TILE 1
#pragma GCC push_options
#pragma GCC target("avx512bf16")

namespace frog::avx512 {

constexpr int kPair = 2;  // columns that an instruction multiplies and adds at once

inline __m512 add_products(__m512 sums, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b);
}

// `columns` of two in a row, and zero for the other, as one element of 32 bits
template <int columns>
__m512i pair_at(const uint16_t* row) {
  int pair = 0;
  __builtin_memcpy(&pair, row, columns * sizeof(uint16_t));
  return _mm512_set1_epi32(pair);
}

// R rows of v against N vectors of xt; the sums stay in registers until they are rounded.
template <int R, int N>
void bf16_tile_fixed(const uint16_t* xt, const uint16_t* v, int64_t v_ld, int64_t count, const float* start,
                     int64_t start_ld, int64_t live, uint16_t* out, int64_t out_ld) {
  __m512 sums[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sums[r][n] = _mm512_loadu_ps(start + r * start_ld + n * F32::kWidth);
  }
  int64_t c = 0;
  const auto step = [&](auto pair) {
    __m512i x[N];
    for (int n = 0; n < N; ++n) x[n] = _mm512_loadu_si512(xt + (c * N + kPair * n) * F32::kWidth);
    for (int r = 0; r < R; ++r) {
      const __m512i factor = pair(v + r * v_ld + c);
      for (int n = 0; n < N; ++n) sums[r][n] = add_products(sums[r][n], factor, x[n]);
    }
  };
  for (; c + kPair <= count; c += kPair) step(pair_at<kPair>);
  if (c < count) step(pair_at<1>);
  const int64_t rest = live - (N - 1) * F32::kWidth;  // of the last vector
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) {
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(sums[r][n]);
      const __mmask16 kept = n + 1 < N ? 0xFFFF : first_lanes32(rest);
      _mm256_mask_storeu_epi16(out + r * out_ld + n * F32::kWidth, kept, rounded);
    }
  }
}

template <int N>
void bf16_tile_rows(const uint16_t* xt, const uint16_t* v, int64_t v_ld, int64_t rows, int64_t count,
                    const float* start, int64_t start_ld, int64_t live, uint16_t* out, int64_t out_ld) {
  int64_t r = 0;
  const auto take = [&](auto tile, int taken) {
    tile(xt, v + r * v_ld, v_ld, count, start + r * start_ld, start_ld, live, out + r * out_ld, out_ld);
    r += taken;
  };
  while (r + 6 <= rows) take(bf16_tile_fixed<6, N>, 6);
  if (r + 4 <= rows) take(bf16_tile_fixed<4, N>, 4);
  if (r + 2 <= rows) take(bf16_tile_fixed<2, N>, 2);
  if (r < rows) take(bf16_tile_fixed<1, N>, 1);
}

inline void bf16_tile(const uint16_t* xt, int64_t width, const uint16_t* v, int64_t v_ld, int64_t rows, int64_t count,
                      const float* start, int64_t start_ld, int64_t live, uint16_t* out, int64_t out_ld) {
  const auto take = [&](auto tile) { tile(xt, v, v_ld, rows, count, start, start_ld, live, out, out_ld); };
  switch (width / F32::kWidth) {
    case 4:
      return take(bf16_tile_rows<4>);
    case 3:
      return take(bf16_tile_rows<3>);
    case 2:
      return take(bf16_tile_rows<2>);
    default:
      return take(bf16_tile_rows<1>);
  }
}

// Pairs of columns move as one float, so that squares of 16 rows and 32 columns are turned as those of floats are.
inline void bf16_pack(const float* x, int64_t ld, int64_t rows, int64_t count, int64_t width, uint16_t* xt) {
  constexpr int64_t kRows = F32::kWidth, kColumns = kPair * kRows;
  for (int64_t r0 = 0; r0 < width; r0 += kRows) {
    int64_t c = 0;
    for (; r0 + kRows <= rows && c + kColumns <= count; c += kColumns) {
      float pairs[kRows * kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        const float* from = x + (r0 + r) * ld + c;
        const __m512bh narrow = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + kRows), _mm512_loadu_ps(from));
        _mm512_storeu_si512(pairs + r * kRows, (__m512i)narrow);
      }
      transpose_floats(pairs, kRows, reinterpret_cast<float*>(xt + c * width + kPair * r0), width);
    }
    for (; c < count; c += kPair) {
      for (int64_t r = r0; r < r0 + kRows; ++r) {
        uint16_t* to = xt + c * width + kPair * r;
        for (int64_t j = 0; j < kPair; ++j) {
          to[j] = 0;
          if (r < rows && c + j < count) narrow_bf16(x + r * ld + c + j, 1, to + j);
        }
      }
    }
  }
}

}  // namespace frog::avx512

#pragma GCC pop_options
#endif
