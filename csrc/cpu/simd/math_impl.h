// The pointwise family, softmax rows and conversions of low precision, written once over the vectors at hand.
#pragma once

namespace frog::FROG_ISA {

// Calls body(load, store, j) for whole vectors of [0, n) and once for the rest.
template <class V, class Body>
inline void for_each_vector(int64_t n, const Body& body) {
  int64_t j = 0;
  for (; j + V::kWidth <= n; j += V::kWidth) body(j, int64_t{V::kWidth});
  if (j < n) body(j, n - j);
}
template <class V>
inline V load_up_to(const typename V::Scalar* p, int64_t n, V rest) {
  return n == V::kWidth ? V::load(p) : load_part(p, n, rest);
}
template <class V>
inline void store_up_to(V a, typename V::Scalar* p, int64_t n) {
  if (n == V::kWidth) {
    a.store(p);
  } else {
    store_part(a, p, n);
  }
}

// ---- the pointwise family

template <class V>
struct Dual {
  V value, slope;
};

// s = 1 / (1 + exp(-x)) and 1 - s, both relatively exact
template <class V>
struct Logistic {
  V s, complement;
  explicit Logistic(V x) {
    const V zero = V::zero(), one = V::set(1);
    const V e = exp(zero - abs(x));
    const V large = one / (one + e);
    const V small = e * large;
    s = select(x < zero, small, large);
    complement = select(x < zero, large, small);
  }
};

// Values and slopes, at kinks and for NaN as PyTorch has them; a = alpha, b = beta.
struct Identity {
  template <class V>
  static Dual<V> at(V x, V, V) {
    return {x, V::set(1)};
  }
};
struct Relu {
  template <class V>
  static Dual<V> at(V x, V, V) {
    return {max(V::zero(), x), select(x <= V::zero(), V::zero(), V::set(1))};
  }
};
struct Gelu {
  template <class V>
  static Dual<V> at(V x, V, V) {
    V cdf, density;
    normal(x, &cdf, &density);
    return {x * cdf, fma(x, density, cdf)};
  }
};
struct GeluTanh {  // (1 + tanh u) / 2 is the logistic function of 2 u
  template <class V>
  static Dual<V> at(V x, V, V) {
    const auto c = typename V::Scalar(1.5957691216057307117597842397375);  // 2 sqrt(2 / pi)
    const V square = x * x, one = V::set(1);
    const Logistic<V> l(V::set(c) * x * fma(V::set(typename V::Scalar(0.044715)), square, one));
    const V inner = V::set(c) * fma(V::set(typename V::Scalar(3 * 0.044715)), square, one);
    return {x * l.s, fma(x * l.s, l.complement * inner, l.s)};
  }
};
struct Silu {
  template <class V>
  static Dual<V> at(V x, V, V) {
    const Logistic<V> l(x);
    const V y = x * l.s;
    return {y, fma(y, l.complement, l.s)};
  }
};
struct Tanh {
  template <class V>
  static Dual<V> at(V x, V, V) {
    const V y = tanh(x);
    return {y, fma(V::zero() - y, y, V::set(1))};
  }
};
struct Sigmoid {
  template <class V>
  static Dual<V> at(V x, V, V) {
    const Logistic<V> l(x);
    return {l.s, l.s * l.complement};
  }
};
struct Softplus {  // a: beta, b: threshold
  template <class V>
  static Dual<V> at(V x, V a, V b) {
    const V z = x * a, zero = V::zero(), one = V::set(1);
    const V e = exp(zero - abs(z));
    const V large = one / (one + e);
    const V soft = (max(zero, z) + log1p_unit(e)) / a;
    return {select(b < z, x, soft), select(b < z, one, select(z < zero, e * large, large))};
  }
};
struct Elu {
  template <class V>
  static Dual<V> at(V x, V a, V) {
    const V low = min(V::zero(), x);
    return {select(x <= V::zero(), a * expm1(low), x), select(x <= V::zero(), a * exp(low), V::set(1))};
  }
};
struct LeakyRelu {
  template <class V>
  static Dual<V> at(V x, V a, V) {
    return {select(V::zero() < x, x, a * x), select(V::zero() < x, V::set(1), a)};
  }
};
struct Hardtanh {
  template <class V>
  static Dual<V> at(V x, V a, V b) {
    const V inside = select(b <= x, V::zero(), V::set(1));
    return {min(b, max(a, x)), select(x <= a, V::zero(), inside)};
  }
};

template <class T, class F>
void map_dual(T alpha, T beta, const T* x, int64_t n, T* y, T* slope) {
  using V = typename VectorOf<T>::type;
  const V a = V::set(alpha), b = V::set(beta);
  for_each_vector<V>(n, [=](int64_t j, int64_t m) {
    const Dual<V> d = F::at(load_up_to(x + j, m, V::zero()), a, b);
    store_up_to(d.value, y + j, m);
    store_up_to(d.slope, slope + j, m);
  });
}

template <class T>
void activate(int64_t function, T alpha, T beta, const T* x, int64_t n, T* y, T* slope) {
  using Map = void (*)(T, T, const T*, int64_t, T*, T*);
  static const Map maps[] = {map_dual<T, Identity>, map_dual<T, Relu>,      map_dual<T, Gelu>,    map_dual<T, GeluTanh>,
                             map_dual<T, Silu>,     map_dual<T, Tanh>,      map_dual<T, Sigmoid>, map_dual<T, Softplus>,
                             map_dual<T, Elu>,      map_dual<T, LeakyRelu>, map_dual<T, Hardtanh>};
  maps[function](alpha, beta, x, n, y, slope);
}

template <class T, bool kMask, class Tangent>
inline void apply_slope_to(const T* slope, int64_t n, T* dy, const Tangent& tangent) {
  using V = typename VectorOf<T>::type;
  for_each_vector<V>(n, [=](int64_t j, int64_t m) {
    const V s = load_up_to(slope + j, m, V::zero()), t = tangent(j, m);
    store_up_to(kMask ? select(V::zero() < s, t, V::zero()) : s * t, dy + j, m);
  });
}

template <class T, bool kMask>
void apply_slope(const T* slope, const T* dx, const T* v, int64_t n, T* dy) {
  using V = typename VectorOf<T>::type;
  if (dx != nullptr && v != nullptr) {
    apply_slope_to<T, kMask>(slope, n, dy, [=](int64_t j, int64_t m) {
      return load_up_to(dx + j, m, V::zero()) + load_up_to(v + j, m, V::zero());
    });
  } else {
    const T* given = dx != nullptr ? dx : v;
    apply_slope_to<T, kMask>(slope, n, dy, [=](int64_t j, int64_t m) { return load_up_to(given + j, m, V::zero()); });
  }
}

template <class T>
void add_scaled(const T* a, T c, int64_t n, T* sums) {
  using V = typename VectorOf<T>::type;
  const V factor = V::set(c);
  for_each_vector<V>(n, [=](int64_t j, int64_t m) {
    store_up_to(fma(factor, load_up_to(a + j, m, V::zero()), load_up_to(sums + j, m, V::zero())), sums + j, m);
  });
}

// ---- rows

template <class T>
T softmax(const T* x, int64_t n, T* p, T* shift) {
  using V = typename VectorOf<T>::type;
  const V lowest = V::set(-static_cast<T>(__builtin_inf()));
  V top = lowest;
  for_each_vector<V>(n, [&](int64_t j, int64_t m) { top = max(load_up_to(x + j, m, lowest), top); });
  T lanes[V::kWidth];
  top.store(lanes);
  for (int l = 1; l < V::kWidth; ++l) lanes[0] = lanes[l] > lanes[0] ? lanes[l] : lanes[0];
  *shift = lanes[0];
  const V s = V::set(lanes[0]);
  V total = V::zero();
  for_each_vector<V>(n, [&](int64_t j, int64_t m) {
    const V e = exp(load_up_to(x + j, m, lowest) - s);  // 0 beyond the end
    total = total + e;
    store_up_to(e, p + j, m);
  });
  const T sum = total.sum();
  const V factor = V::set(T(1) / sum);
  for_each_vector<V>(n, [&](int64_t j, int64_t m) { store_up_to(load_up_to(p + j, m, V::zero()) * factor, p + j, m); });
  return sum;
}

template <class T>
T dot(const T* a, const T* b, int64_t n) {
  using V = typename VectorOf<T>::type;
  V sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};  // against the latency of the sum
  int64_t j = 0;
  for (; j + 4 * V::kWidth <= n; j += 4 * V::kWidth) {
    for (int u = 0; u < 4; ++u) sums[u] = fma(V::load(a + j + u * V::kWidth), V::load(b + j + u * V::kWidth), sums[u]);
  }
  for (; j < n; j += V::kWidth) {
    const int64_t m = n - j < V::kWidth ? n - j : V::kWidth;
    sums[0] = fma(load_up_to(a + j, m, V::zero()), load_up_to(b + j, m, V::zero()), sums[0]);
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])).sum();
}

template <class T>
void dots(const T* g, const T* dx, int64_t n, int64_t rows, T* out) {
  for (int64_t r = 0; r < rows; ++r) out[r] = dot(g + r * n, dx + r * n, n);
}

template <class T, bool kLog>
void softmax_tangents(const T* p, const T* dx, int64_t n, int64_t rows, T* dy) {
  using V = typename VectorOf<T>::type;
  for (int64_t r = 0; r < rows; ++r) {
    const T *weights = p + r * n, *from = dx + r * n;
    T* to = dy + r * n;
    const V mean = V::set(dot(weights, from, n));
    for_each_vector<V>(n, [=](int64_t j, int64_t m) {
      const V centred = load_up_to(from + j, m, V::zero()) - mean;
      store_up_to(kLog ? centred : load_up_to(weights + j, m, V::zero()) * centred, to + j, m);
    });
  }
}

// ---- low precision

inline void widen_bf16(const uint16_t* from, int64_t n, float* to) {
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t bits = static_cast<uint32_t>(from[j]) << 16;
    __builtin_memcpy(to + j, &bits, sizeof(bits));
  }
}

// to the nearest, ties to even; a NaN becomes the quiet NaN
inline void narrow_bf16(const float* from, int64_t n, uint16_t* to) {
  for (int64_t j = 0; j < n; ++j) {
    uint32_t bits;
    __builtin_memcpy(&bits, from + j, sizeof(bits));
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    to[j] = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
  }
}

#if FROG_HALF_CONVERSION
inline void widen_f16(const uint16_t* from, int64_t n, float* to) {
  int64_t j = 0;
  for (; j + kHalfLanes <= n; j += kHalfLanes) widen_half_lanes(from + j, to + j);
  if (j == n) return;
  uint16_t rest[kHalfLanes] = {};
  float wide[kHalfLanes];
  for (int64_t l = 0; j + l < n; ++l) rest[l] = from[j + l];
  widen_half_lanes(rest, wide);
  for (int64_t l = 0; j + l < n; ++l) to[j + l] = wide[l];
}

inline void narrow_f16(const float* from, int64_t n, uint16_t* to) {
  int64_t j = 0;
  for (; j + kHalfLanes <= n; j += kHalfLanes) narrow_half_lanes(from + j, to + j);
  if (j == n) return;
  float rest[kHalfLanes] = {};
  uint16_t half[kHalfLanes];
  for (int64_t l = 0; j + l < n; ++l) rest[l] = from[j + l];
  narrow_half_lanes(rest, half);
  for (int64_t l = 0; j + l < n; ++l) to[j + l] = half[l];
}
constexpr auto kWidenHalf = widen_f16;
constexpr auto kNarrowHalf = narrow_f16;
#else
constexpr decltype(SimdKernels::widen_f16) kWidenHalf = nullptr;
constexpr decltype(SimdKernels::narrow_f16) kNarrowHalf = nullptr;
#endif

template <class T>
constexpr MathKernels<T> math_kernels() {
  return {activate<T>, apply_slope<T, false>,      apply_slope<T, true>,     add_scaled<T>, softmax<T>,
          dots<T>,     softmax_tangents<T, false>, softmax_tangents<T, true>};
}

}  // namespace frog::FROG_ISA
