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
// A product and a sum, rounded twice: without FMA hardware std::fma is a slow library call, and no drawn bit depends on
// this one.
template <class T>
inline Lanes<T> fma(Lanes<T> a, Lanes<T> b, Lanes<T> c) {
  for (int l = 0; l < Lanes<T>::kWidth; ++l) c.v[l] += a.v[l] * b.v[l];
  return c;
}
constexpr int kTileVectors = 1;

struct NormalGroup {
  uint64_t call;
  void start(const Schedule&, uint64_t group) { call = group * kCallsPerGroup; }
  // The 64 elements of the group for one tangent, in order.
  void draw(const Schedule& s, uint32_t tangent, F32 out[16]) const {
    float values[kNormalGroup];
    for (int c = 0; c < kCallsPerGroup; ++c) {
      const PhiloxWords words = tangent_words(s.key, s.step, tangent, call + c);
      for (int w = 0; w < 4; ++w) {
        float* pair = values + 32 * (w / 2) + 16 * (c % 2) + 4 * (c / 2) + 2 * (w % 2);
        normal_pair(words.w[w], pair, pair + 1);
      }
    }
    for (int j = 0; j < 16; ++j) out[j] = F32::load(values + 4 * j);
  }
};

struct RademacherGroup {
  uint64_t call;
  void start(const Schedule&, uint64_t group) { call = group * kCallsPerGroup; }
  void bits(const Schedule& s, uint32_t tangent, uint32_t out[32]) const {
    for (int c = 0; c < kCallsPerGroup; ++c) {
      const PhiloxWords words = tangent_words(s.key, s.step, tangent, call + c);
      for (int w = 0; w < 4; ++w) out[16 * (w / 2) + 2 * c + w % 2] = words.w[w];
    }
  }
};

inline F32 signs(const uint32_t* bits, int64_t at) {
  const uint32_t four = bits[at / 32] >> (at % 32);
  F32 x;
  for (int l = 0; l < F32::kWidth; ++l) x.v[l] = (four >> l) & 1u ? -1.0f : 1.0f;
  return x;
}

}  // namespace frog::baseline
