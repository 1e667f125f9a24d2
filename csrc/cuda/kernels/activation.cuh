// The pointwise family on one element: value and slope, which pointwise_jvp and the fused activation of linear_jvp
// share. At kinks and for NaN they are what csrc/cpu/simd/math_impl.h has. Functions are those of CUDA's library, a few
// units in the last place off; tails are formed so that they stay relatively exact.
#pragma once

#include "platform.cuh"

namespace frog {

/// Codes of POINTWISE in frog_cuda/ops/pointwise.py, and what alpha (a) and beta (b) mean.
enum Activation : int {
  kIdentity = 0,
  kRelu = 1,
  kGelu = 2,
  kGeluTanh = 3,
  kSilu = 4,
  kTanh = 5,
  kSigmoid = 6,
  kSoftplus = 7,   // a: beta, b: threshold
  kElu = 8,        // a: alpha
  kLeakyRelu = 9,  // a: slope below zero
  kHardtanh = 10,  // a: lowest, b: highest value
};

template <class C>
struct Dual {
  C value, slope;
};

// s = 1 / (1 + exp(-x)) and 1 - s, both relatively exact.
template <class C>
struct Logistic {
  C s, complement;
};
template <class C>
__device__ __forceinline__ Logistic<C> logistic(C x) {
  const C e = exp(-fabs(x));
  const C large = C(1) / (C(1) + e), small = e * large;
  return x < C(0) ? Logistic<C>{small, large} : Logistic<C>{large, small};
}

template <int kFunction, class C>
__device__ __forceinline__ Dual<C> activate(C x, C a, C b) {
  if constexpr (kFunction == kRelu) {
    return x <= C(0) ? Dual<C>{C(0), C(0)} : Dual<C>{x, C(1)};
  } else if constexpr (kFunction == kGelu) {
    const C cdf = normcdf(x), density = C(0.39894228040143267794) * exp(C(-0.5) * x * x);  // 1 / sqrt(2 pi)
    return {x * cdf, x * density + cdf};
  } else if constexpr (kFunction == kGeluTanh) {  // (1 + tanh u) / 2 is the logistic function of 2 u
    const C c = C(1.5957691216057307117597842397375), square = x * x;  // 2 sqrt(2 / pi)
    const Logistic<C> l = logistic(c * x * (C(0.044715) * square + C(1)));
    const C inner = c * (C(3 * 0.044715) * square + C(1)), y = x * l.s;
    return {y, y * (l.complement * inner) + l.s};
  } else if constexpr (kFunction == kSilu) {
    const Logistic<C> l = logistic(x);
    const C y = x * l.s;
    return {y, y * l.complement + l.s};
  } else if constexpr (kFunction == kTanh) {
    const C y = tanh(x);
    return {y, C(1) - y * y};
  } else if constexpr (kFunction == kSigmoid) {
    const Logistic<C> l = logistic(x);
    return {l.s, l.s * l.complement};
  } else if constexpr (kFunction == kSoftplus) {
    const C z = x * a, e = exp(-fabs(z)), large = C(1) / (C(1) + e);
    if (z > b) return {x, C(1)};
    const C soft = ((z < C(0) ? C(0) : z) + log1p(e)) / a;
    return {soft, z < C(0) ? e * large : large};
  } else if constexpr (kFunction == kElu) {
    if (x <= C(0)) return {a * expm1(x), a * exp(x)};
    return {x, C(1)};
  } else if constexpr (kFunction == kLeakyRelu) {
    return x > C(0) ? Dual<C>{x, C(1)} : Dual<C>{a * x, a};
  } else if constexpr (kFunction == kHardtanh) {
    if (x <= a) return {a, C(0)};
    return x >= b ? Dual<C>{b, C(0)} : Dual<C>{x, C(1)};
  } else {
    static_assert(kFunction == kIdentity);
    return {x, C(1)};
  }
}

/// Value and slope of N elements. The function is chosen once for all of them, and all threads choose the same.
template <int N, class C>
__device__ __forceinline__ void activate(int function, C a, C b, const C (&x)[N], C (&y)[N], C (&slope)[N]) {
#define FROG_CASE(f)                                \
  case f:                                           \
    _Pragma("unroll") for (int j = 0; j < N; ++j) { \
      const Dual<C> d = activate<f>(x[j], a, b);    \
      y[j] = d.value, slope[j] = d.slope;           \
    }                                               \
    break
  switch (function) {
    FROG_CASE(kRelu);
    FROG_CASE(kGelu);
    FROG_CASE(kGeluTanh);
    FROG_CASE(kSilu);
    FROG_CASE(kTanh);
    FROG_CASE(kSigmoid);
    FROG_CASE(kSoftplus);
    FROG_CASE(kElu);
    FROG_CASE(kLeakyRelu);
    FROG_CASE(kHardtanh);
    default:
      FROG_CASE(kIdentity);
  }
#undef FROG_CASE
}

/// Whether the slope is 0 or 1 and stops tangents rather than multiplying them: 0 stays 0 where a tangent is infinite.
__host__ __device__ constexpr bool stops_tangents(int function) { return function == kRelu || function == kHardtanh; }

template <class C>
__device__ __forceinline__ C apply_slope(bool stops, C slope, C tangent) {
  return stops && slope == C(0) ? C(0) : slope * tangent;
}

}  // namespace frog
