// The path for machines without AVX2, and for compilers without the pragmas: plain loops over distributions.h.
#pragma once

namespace frog::baseline {

template <class T>
struct Lanes {
  static constexpr int kWidth = 16 / sizeof(T);  // an SSE or NEON register; the compiler vectorises the loops below
  using Scalar = T;
  T v[kWidth];
  static Lanes load(const T* p) {
    Lanes x;
    for (int l = 0; l < kWidth; ++l) x.v[l] = p[l];
    return x;
  }
  static Lanes set(T value) {
    Lanes x;
    for (int l = 0; l < kWidth; ++l) x.v[l] = value;
    return x;
  }
  static Lanes zero() { return set(T(0)); }
  void store(T* p) const {
    for (int l = 0; l < kWidth; ++l) p[l] = v[l];
  }
  T sum() const {
    T total = T(0);
    for (int l = 0; l < kWidth; ++l) total += v[l];
    return total;
  }
};
using F32 = Lanes<float>;
using F64 = Lanes<double>;
inline F32 add(F32 a, F32 b) {
  for (int l = 0; l < F32::kWidth; ++l) a.v[l] += b.v[l];
  return a;
}
// A product and a sum, rounded twice: without FMA hardware std::fma is a slow library call, and no drawn bit depends on
// this one.
template <class T>
inline Lanes<T> fma(Lanes<T> a, Lanes<T> b, Lanes<T> c) {
  for (int l = 0; l < Lanes<T>::kWidth; ++l) c.v[l] += a.v[l] * b.v[l];
  return c;
}
constexpr int kTileVectors = 1;
constexpr bool kTransposesFloats = false;
inline void transpose_floats(const float*, int64_t, float*, int64_t) {}

struct PhiloxGroup {
  uint64_t call;
  void start(const Schedule&, uint64_t group) { call = group * kCallsPerGroup; }
  // out[n] receives the words of tangent + n.
  template <int N>
  void words(const Schedule& s, uint32_t tangent, GroupWords* out) const {
    for (int n = 0; n < N; ++n) {
      for (int c = 0; c < kCallsPerGroup; ++c) {
        const PhiloxWords words = tangent_words(s.key, s.step, tangent + static_cast<uint32_t>(n), call + c);
        for (int w = 0; w < 4; ++w) out[n].w[16 * (w / 2) + 2 * c + w % 2] = words.w[w];
      }
    }
  }
};

// The 64 normal elements of a group, in order.
inline void normals(const GroupWords& words, F32 out[16]) {
  float values[kNormalGroup];
  for (int c = 0; c < kCallsPerGroup; ++c) {
    for (int w = 0; w < 4; ++w) {
      float* pair = values + 32 * (w / 2) + 16 * (c % 2) + 4 * (c / 2) + 2 * (w % 2);
      normal_pair(words.w[16 * (w / 2) + 2 * c + w % 2], pair, pair + 1);
    }
  }
  for (int j = 0; j < 16; ++j) out[j] = F32::load(values + 4 * j);
}

// +c or -c by the four bits from bit `at` (a multiple of 4).
inline F32 signed_by(const GroupWords& words, int64_t at, F32 c) {
  const uint32_t four = words.w[at / 32] >> (at % 32);
  for (int l = 0; l < F32::kWidth; ++l) c.v[l] = (four >> l) & 1u ? -c.v[l] : c.v[l];
  return c;
}

// +1 or -1 for the 32 bits of a word.
inline void store_signs(uint32_t word, float* out) {
  for (int l = 0; l < 32; ++l) out[l] = (word >> l) & 1u ? -1.0f : 1.0f;
}

}  // namespace frog::baseline
