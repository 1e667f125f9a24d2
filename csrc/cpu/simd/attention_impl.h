// One step of online softmax (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018) with tangents.
// Included by each instruction set inside its target pragma, before kernels_impl.h.
#pragma once

namespace frog::FROG_ISA {

// exp(x) for x <= 0, flushed to 0 below -87 where float results turn subnormal. x = n ln 2 + r, |r| <= ln 2 / 2, exp(r)
// by its Taylor polynomial to r^7: relative error below 1e-7.
inline float exp_nonpositive(float x) {
  if (!(x > -87.0f)) return x == x ? 0.0f : x;
  constexpr float kMagic = 12582912.0f;  // 1.5 2^23: adding it rounds to an integer, which its low bits then hold
  const float shifted = x * 1.44269504088896341f + kMagic;
  const float n = shifted - kMagic;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts; the first product is exact
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * bits_float((float_bits(shifted) << 23) + 0x3F800000u);
}
inline double exp_nonpositive(double x) { return __builtin_exp(x); }

// scores [1 + k, rows, ld]: of each query row the scores s against `count` keys, then their k tangents ds_i; they
// become p = exp(s - max) and p ds_i. max and sum [rows] are the running maximum and normaliser, shift [k, rows] the
// running sums of p ds_i; those of earlier keys are brought to the new maximum by correction [rows], which the caller
// applies to its own sums. A row that has met no finite score has max -inf and p = 0.
template <class T>
void attend(T* scores, int64_t rows, int64_t k, int64_t count, int64_t ld, T* max, T* sum, T* shift, T* correction) {
  constexpr int kLanes = 64 / sizeof(T);  // independent partial results, for the compiler to keep in vector registers
  for (int64_t r = 0; r < rows; ++r) {
    T* s = scores + r * ld;
    T top[kLanes];
    for (int l = 0; l < kLanes; ++l) top[l] = max[r];
    int64_t j = 0;
    for (; j + kLanes <= count; j += kLanes) {
      for (int l = 0; l < kLanes; ++l) top[l] = s[j + l] <= top[l] ? top[l] : s[j + l];  // NaN wins
    }
    T best = top[0];
    for (int l = 1; l < kLanes; ++l) best = top[l] <= best ? best : top[l];
    for (; j < count; ++j) best = s[j] <= best ? best : s[j];

    const bool nothing = best == -__builtin_inf();
    const T base = nothing ? T(0) : best;
    correction[r] = nothing ? T(1) : exp_nonpositive(max[r] - base);
    max[r] = best;
    T partial[kLanes];
    for (int l = 0; l < kLanes; ++l) partial[l] = T(0);
    for (j = 0; j + kLanes <= count; j += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        s[j + l] = exp_nonpositive(s[j + l] - base);
        partial[l] += s[j + l];
      }
    }
    T total = T(0);
    for (; j < count; ++j) total += s[j] = exp_nonpositive(s[j] - base);
    for (int l = 0; l < kLanes; ++l) total += partial[l];
    sum[r] = sum[r] * correction[r] + total;

    for (int64_t i = 0; i < k; ++i) {
      T* ds = scores + ((1 + i) * rows + r) * ld;
      for (int l = 0; l < kLanes; ++l) partial[l] = T(0);
      for (j = 0; j + kLanes <= count; j += kLanes) {
        for (int l = 0; l < kLanes; ++l) {
          ds[j + l] *= s[j + l];
          partial[l] += ds[j + l];
        }
      }
      T moved = T(0);
      for (; j < count; ++j) moved += ds[j] *= s[j];
      for (int l = 0; l < kLanes; ++l) moved += partial[l];
      shift[i * rows + r] = shift[i * rows + r] * correction[r] + moved;
    }
  }
}

// out [groups, rows, width] times correction [rows]
template <class T>
void rescale(T* out, int64_t groups, int64_t rows, int64_t width, const T* correction) {
  for (int64_t r = 0; r < rows; ++r) {
    if (correction[r] == T(1)) continue;
    for (int64_t g = 0; g < groups; ++g) {
      T* row = out + (g * rows + r) * width;
      for (int64_t j = 0; j < width; ++j) row[j] *= correction[r];
    }
  }
}

}  // namespace frog::FROG_ISA
