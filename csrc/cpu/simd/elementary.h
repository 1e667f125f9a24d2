// Exponential, logarithm, hyperbolic tangent and normal distribution over the vectors at hand. float: polynomials,
// errors of one to three units in the last place. double: the C library, lane by lane; it serves exactness, not speed.
//
// The coefficients are minimax fits made for this file; each states the relative error before rounding.
#pragma once

namespace frog::FROG_ISA {

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = F32;
};
template <>
struct VectorOf<double> {
  using type = F64;
};

template <int N>
inline F32 polynomial(F32 x, const float (&c)[N]) {
  F32 p = F32::set(c[N - 1]);
  for (int j = N - 2; j >= 0; --j) p = fma(p, x, F32::set(c[j]));
  return p;
}

// exp(r) = 1 + r + r^2 q(r) on |r| <= ln(2) / 2: 1.3e-8 of r
constexpr float kExpQ[5] = {0.5f, 0.16666541993618011f, 0.04166628047823906f, 0.008366644382476807f,
                            0.0013946554390713573f};
// artanh(w) = w + w z p(z), z = w^2 <= 1 / 9: 4.6e-9
constexpr float kArtanhP[4] = {0.3333320617675781f, 0.2001088559627533f, 0.13998931646347046f, 0.14015637338161469f};
// Mills ratio of the normal distribution, (1 - cdf(a)) / density(a), times (a + 4), in (a - 4) / (a + 4), a <=
// 15: 9.3e-09
constexpr float kMills[10] = {1.8932191133499146f,     -1.5237706899642944f,  0.9704083800315857f,
                              -0.46754565834999084f,   0.15140873193740845f,  -0.018858732655644417f,
                              -0.008796517737209797f,  0.003930145874619484f, 0.00043346654274500906f,
                              -0.00033846829319372773f};
// (cdf(x) - 1/2) / x in x^2 <= 1/2: 1.4e-9
constexpr float kCentreP[5] = {0.3989422917366028f, -0.06649032980203629f, 0.00997269805520773f, -0.001182502368465066f,
                               0.00010424325591884553f};

// x = n ln 2 + r; ln 2 in two parts, the first with trailing zeros so that its product with n is exact
struct Reduced {
  F32 n, r, rest;  // exp(r) = 1 + r + rest
};
inline Reduced reduce(F32 x) {
  const F32 n = round_even(x * F32::set(1.44269504f));
  const F32 r = fma(n, F32::set(-1.42860677e-6f), fma(n, F32::set(-0.693145752f), x));
  return {n, r, r * r * polynomial(r, kExpQ)};
}

inline F32 exp(F32 x) {
  // beyond these bounds the result is 0 or infinite anyway
  const Reduced d = reduce(min(F32::set(89.0f), max(F32::set(-104.0f), x)));
  return scale_by_power(F32::set(1.0f) + (d.r + d.rest), d.n);
}

inline F32 expm1(F32 x) {
  const Reduced d = reduce(min(F32::set(89.0f), max(F32::set(-104.0f), x)));
  const F32 power = scale_by_power(F32::set(1.0f), d.n);
  return fma(power, d.r + d.rest, power - F32::set(1.0f));
}

/// log(1 + x) for x in [0, 1]: 2 artanh(x / (2 + x))
inline F32 log1p_unit(F32 x) {
  const F32 w = x / (F32::set(2.0f) + x);
  const F32 z = w * w;
  const F32 twice = w + w;
  return fma(twice, z * polynomial(z, kArtanhP), twice);
}

inline F32 tanh(F32 x) {
  const F32 e = expm1(F32::set(-2.0f) * abs(x));  // in (-1, 0]
  return with_sign(e / (F32::set(2.0f) + e), x);
}

/// Standard normal distribution function and density. The tail is density times Mills ratio, hence relatively exact.
inline void normal(F32 x, F32* cdf, F32* density) {
  const F32 a = min(F32::set(15.0f), abs(x));  // the density is 0 there already
  const F32 square = a * a;
  // the rounding error of the square, 0 where fma is not fused
  const F32 lost = fma(a, a, F32::set(0.0f) - square);
  const F32 e = exp(F32::set(-0.5f) * square);
  *density = F32::set(0.398942280f) * fma(e, F32::set(-0.5f) * lost, e);
  const F32 t = F32::set(1.0f) / (a + F32::set(4.0f));
  const F32 tail = *density * (t * polynomial(fma(F32::set(-8.0f), t, F32::set(1.0f)), kMills));
  const F32 outside = select(x < F32::set(0.0f), tail, F32::set(1.0f) - tail);
  const F32 centre = fma(x, polynomial(square, kCentreP), F32::set(0.5f));  // without the tail's rounding errors
  *cdf = select(square < F32::set(0.5f), centre, outside);
}

template <class F>
inline F64 each_lane(F64 x, const F& f) {
  double values[F64::kWidth];
  x.store(values);
  for (int l = 0; l < F64::kWidth; ++l) values[l] = f(values[l]);
  return F64::load(values);
}
inline F64 exp(F64 x) {
  return each_lane(x, [](double v) { return ::exp(v); });
}
inline F64 expm1(F64 x) {
  return each_lane(x, [](double v) { return ::expm1(v); });
}
inline F64 log1p_unit(F64 x) {
  return each_lane(x, [](double v) { return ::log1p(v); });
}
inline F64 tanh(F64 x) {
  return each_lane(x, [](double v) { return ::tanh(v); });
}
inline void normal(F64 x, F64* cdf, F64* density) {
  *cdf = each_lane(x, [](double v) { return 0.5 * ::erfc(v * -0.70710678118654752440); });
  *density = F64::set(0.39894228040143267794) * exp(F64::set(-0.5) * x * x);
}

}  // namespace frog::FROG_ISA
