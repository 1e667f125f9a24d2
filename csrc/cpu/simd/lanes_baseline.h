// What the elementary functions need beyond isa_baseline.h: arithmetic, comparisons, rounding, parts of a vector.
#pragma once

namespace frog::baseline {

template <class T>
struct Mask {
  bool v[Lanes<T>::kWidth];
};

#define FROG_LANES(expression)                                      \
  Lanes<T> out;                                                     \
  for (int l = 0; l < Lanes<T>::kWidth; ++l) out.v[l] = expression; \
  return out

template <class T>
inline Lanes<T> operator+(Lanes<T> a, Lanes<T> b) {
  FROG_LANES(a.v[l] + b.v[l]);
}
template <class T>
inline Lanes<T> operator-(Lanes<T> a, Lanes<T> b) {
  FROG_LANES(a.v[l] - b.v[l]);
}
template <class T>
inline Lanes<T> operator*(Lanes<T> a, Lanes<T> b) {
  FROG_LANES(a.v[l] * b.v[l]);
}
template <class T>
inline Lanes<T> operator/(Lanes<T> a, Lanes<T> b) {
  FROG_LANES(a.v[l] / b.v[l]);
}
// so that a NaN in the second argument passes
template <class T>
inline Lanes<T> max(Lanes<T> a, Lanes<T> b) {
  FROG_LANES((a.v[l] > b.v[l] ? a.v[l] : b.v[l]));
}
template <class T>
inline Lanes<T> min(Lanes<T> a, Lanes<T> b) {
  FROG_LANES((a.v[l] < b.v[l] ? a.v[l] : b.v[l]));
}
template <class T>
inline Lanes<T> abs(Lanes<T> a) {
  FROG_LANES((a.v[l] < T(0) ? -a.v[l] : a.v[l]));
}
template <class T>
inline Mask<T> operator<(Lanes<T> a, Lanes<T> b) {
  Mask<T> m;
  for (int l = 0; l < Lanes<T>::kWidth; ++l) m.v[l] = a.v[l] < b.v[l];
  return m;
}
template <class T>
inline Mask<T> operator<=(Lanes<T> a, Lanes<T> b) {
  Mask<T> m;
  for (int l = 0; l < Lanes<T>::kWidth; ++l) m.v[l] = a.v[l] <= b.v[l];
  return m;
}
template <class T>
inline Lanes<T> select(Mask<T> m, Lanes<T> yes, Lanes<T> no) {
  FROG_LANES((m.v[l] ? yes.v[l] : no.v[l]));
}
template <class T>
inline Lanes<T> load_part(const T* p, int64_t n, Lanes<T> rest) {
  FROG_LANES((l < n ? p[l] : rest.v[l]));
}
template <class T>
inline void store_part(Lanes<T> a, T* p, int64_t n) {
  for (int64_t l = 0; l < n; ++l) p[l] = a.v[l];
}
#undef FROG_LANES

// Adding 1.5 2^23 leaves no fraction bits, and the whole number in the low bits of the sum.
constexpr float kRounder = 12582912.0f;
inline F32 round_even(F32 a) {
  for (int l = 0; l < F32::kWidth; ++l) a.v[l] = (a.v[l] + kRounder) - kRounder;
  return a;
}
/// a 2^n for whole n in [-150, 129]; in two steps, because 2^n alone may be out of range
inline F32 scale_by_power(F32 a, F32 n) {
  for (int l = 0; l < F32::kWidth; ++l) {
    const uint32_t whole = float_bits(n.v[l] + kRounder) - float_bits(kRounder);
    const uint32_t half = (whole + 256) / 2 - 128;
    a.v[l] *= bits_float((half + 127) << 23);
    a.v[l] *= bits_float((whole - half + 127) << 23);
  }
  return a;
}
/// |magnitude| with the sign of `sign`
inline F32 with_sign(F32 magnitude, F32 sign) {
  for (int l = 0; l < F32::kWidth; ++l) {
    const uint32_t bits = (float_bits(magnitude.v[l]) & 0x7FFFFFFFu) | (float_bits(sign.v[l]) & 0x80000000u);
    magnitude.v[l] = bits_float(bits);
  }
  return magnitude;
}

}  // namespace frog::baseline
