// Statistics and tangents of one group of a normalisation (csrc/cpu/normalization.cpp). Included by each instruction
// set inside its target pragma; no standard-library templates, see kernels.h.
#pragma once

namespace frog::FROG_ISA {

// A vector's lanes of rows, at j, and those that are left at a row's end; missing ones read as `rest`.
template <class T>
struct WholeLanes {
  using V = typename VectorOf<T>::type;
  int64_t j;
  V load(const T* row, V) const { return V::load(row + j); }
  void store(V v, T* row) const { v.store(row + j); }
};
template <class T>
struct PartLanes {
  using V = typename VectorOf<T>::type;
  int64_t j, n;
  V load(const T* row, V rest) const { return load_part(row + j, n, rest); }
  void store(V v, T* row) const { store_part(v, row + j, n); }
};
template <class T, class Body>
inline void for_lanes(int64_t from, int64_t to, const Body& body) {
  constexpr int64_t kWidth = VectorOf<T>::type::kWidth;
  int64_t j = from;
  for (; j + kWidth <= to; j += kWidth) body(WholeLanes<T>{j});
  if (j < to) body(PartLanes<T>{j, to - j});
}

// Elements that a lane sums in T before they enter the double sums
constexpr int64_t kNormalizationRun = 256;

// N sums over outer rows of inner elements: body(o, at, sums) adds a vector of row o to each of them. Lanes go on from
// row to row, however short those are.
template <class T, int N, class Body>
void total(int64_t outer, int64_t inner, double* out, const Body& body) {
  using V = typename VectorOf<T>::type;
  V sums[N];
  for (int s = 0; s < N; ++s) out[s] = 0, sums[s] = V::zero();
  int64_t taken = 0;
  const auto close = [&] {
    for (int s = 0; s < N; ++s) {
      out[s] += static_cast<double>(sums[s].sum());
      sums[s] = V::zero();
    }
    taken = 0;
  };
  constexpr int64_t kStretch = kNormalizationRun * V::kWidth;
  for (int64_t o = 0; o < outer; ++o) {
    for (int64_t from = 0; from < inner; from += kStretch) {
      const int64_t to = inner - from < kStretch ? inner : from + kStretch;
      if (taken + (to - from) > kStretch) close();
      for_lanes<T>(from, to, [&](const auto& at) { body(o, at, sums); });
      taken += to - from;
    }
  }
  close();
}

// Where the rows of one group lie: `outer` of them with `inner` elements each, `stride` apart; those of its k tangents
// `all` further on each. dx may be null. Tangents in bfloat16 are in low_dx and low_dy instead.
template <class T>
struct GroupRows {
  int64_t outer, inner, stride, all;
  const T *x, *dx;
  T *y, *dy;
  const uint16_t* low_dx;
  uint16_t* low_dy;
};

// A factor or an addend over a run of elements: the same for all of them, or one for each.
template <class T>
struct Coefficient {
  using V = typename VectorOf<T>::type;
  const T* values;
  V constant;
  template <class At>
  V operator()(const At& at) const {
    return values == nullptr ? constant : at.load(values, constant);
  }
};

// Factors of the elements of a group: constant over runs of `inner / weight_inner` elements, or over the whole group.
template <class T>
struct Affine {
  const T* values;  // [weight_inner] of this group, or null
  int64_t run;
  Coefficient<T> over(int64_t from, T otherwise, bool constant) const {
    using V = typename VectorOf<T>::type;
    if (values == nullptr) return {nullptr, V::set(otherwise)};
    return constant ? Coefficient<T>{nullptr, V::set(values[from / run])} : Coefficient<T>{values, V::zero()};
  }
};

template <class T>
Affine<T> affine(const Normalization<T>& p, const T* values, int64_t set, int64_t g, int64_t inner) {
  if (values == nullptr) return {nullptr, 1};
  const int64_t run = p.weight_inner == 0 ? inner : inner / p.weight_inner;
  return {values + (set * p.weight_groups + g % p.weight_groups) * p.weight_inner, run < 1 ? 1 : run};
}

// Calls body(from, to) for the runs of [0, inner) over which every factor is constant; one run for each element where
// weight_inner == inner would be slow, so that case gets the whole range and `constant` = false.
template <class T, class Body>
void for_runs(const Normalization<T>& p, int64_t inner, const Body& body) {
  if (p.weight_inner == inner || p.weight_inner == 0) return body(int64_t{0}, inner, p.weight_inner <= 1);
  const int64_t run = inner / p.weight_inner;
  for (int64_t from = 0; from < inner; from += run) body(from, from + run, true);
}

inline void widen_row(const uint16_t* from, int64_t n, float* to) { widen_bf16(from, n, to); }
inline void widen_row(const uint16_t*, int64_t, double*) {}  // tangents of a double x are converted beforehand
inline void narrow_row(const float* from, int64_t n, uint16_t* to) { narrow_bf16(from, n, to); }
inline void narrow_row(const double*, int64_t, uint16_t*) {}

// Tangents of small groups that are taken together: their sums read x^ once, and those of one do not wait for those of
// another.
constexpr int kTangentsTogether = 4;
constexpr int64_t kTogetherElements = 4096;  // that such a group has at most

template <int N>
struct Count {
  static constexpr int value = N;
};

template <class T>
int64_t tangents_together(const Normalization<T>& p, int64_t n) {
  return n <= kTogetherElements && p.k >= kTangentsTogether ? kTangentsTogether : 1;
}

// Where the N tangents from number i on lie, each row of a group a stride behind the one before; dx may be null.
template <class T, int N>
struct Moving {
  int64_t i;
  const T* dx[N];
  int64_t dx_stride;
  T* dy[N];
  int64_t dy_stride;
};

// dy = w r (dx - mean(dx) - x^ mean(dx x^)) + dw x^ + db for N tangents of group g; hat [outer * inner] is x^.
template <class T, int N>
void move_group(const Normalization<T>& p, int64_t g, int64_t outer, int64_t inner, T r, const T* hat,
                const Moving<T, N>& m) {
  using V = typename VectorOf<T>::type;
  const double count = static_cast<double>(outer * inner);
  const V scale = V::set(r), zero = V::zero();
  double means[2 * N] = {};  // of dx and of dx x^
  if (m.dx[0] != nullptr && p.given_mean == nullptr) {
    total<T, 2 * N>(outer, inner, means, [&m, hat, inner, zero](int64_t o, const auto& at, V* sums) {
      const V normalised = at.load(hat + o * inner, zero);
      for (int t = 0; t < N; ++t) {
        const V dx = at.load(m.dx[t] + o * m.dx_stride, zero);
        sums[2 * t] = sums[2 * t] + dx;
        sums[2 * t + 1] = fma(dx, normalised, sums[2 * t + 1]);
      }
    });
  }
  V shift[N], turn[N];
  Affine<T> dw[N], db[N];
  const Affine<T> w = affine(p, p.weight, 0, g, inner);
  for (int t = 0; t < N; ++t) {
    shift[t] = V::set(p.centred ? static_cast<T>(means[2 * t] / count) : T(0));
    turn[t] = V::set(static_cast<T>(-means[2 * t + 1] / count));
    dw[t] = affine(p, p.dweight, m.i + t, g, inner), db[t] = affine(p, p.dbias, m.i + t, g, inner);
  }
  for (int64_t o = 0; o < outer; ++o) {
    const T* h = hat + o * inner;
    for_runs(p, inner, [&](int64_t from, int64_t to, bool constant) {
      const auto factor = w.over(from, T(1), constant);
      for (int t = 0; t < N; ++t) {
        const auto tilt = dw[t].over(from, T(0), constant), add = db[t].over(from, T(0), constant);
        const T* dx = m.dx[t] == nullptr ? nullptr : m.dx[t] + o * m.dx_stride;
        T* dy = m.dy[t] + o * m.dy_stride;
        if (dx == nullptr) {
          for_lanes<T>(from, to, [=](const auto& at) { at.store(fma(tilt(at), at.load(h, zero), add(at)), dy); });
          continue;
        }
        const V centre = shift[t], slant = turn[t];
        for_lanes<T>(from, to, [=](const auto& at) {
          const V normalised = at.load(h, zero);
          const V change = fma(slant, normalised, at.load(dx, zero) - centre) * scale;
          at.store(fma(factor(at), change, fma(tilt(at), normalised, add(at))), dy);
        });
      }
    });
  }
}

// scratch [1 + 2 N, outer * inner]: x^, and of the N tangents in bfloat16 that are taken together what is read and what
// is written.
template <class T>
void normalise_group(const Normalization<T>& p, int64_t g, const GroupRows<T>& rows, T* scratch) {
  const int64_t outer = rows.outer, inner = rows.inner, stride = rows.stride, n = outer * inner;
  T *hat = scratch, *wide = scratch + n, *result = wide + tangents_together(p, n) * n;
  // tangents in bfloat16 are widened row by row into [outer, inner], and narrowed from there
  const bool low_in = rows.low_dx != nullptr, low_out = rows.low_dy != nullptr;
  const int64_t in_stride = low_in ? inner : stride, out_stride = low_out ? inner : stride;
  const auto fetch_tangents = [&](int64_t i, T* to) {
    if (!low_in) return rows.dx == nullptr ? nullptr : rows.dx + i * rows.all;
    const uint16_t* from = rows.low_dx + i * rows.all;
    for (int64_t o = 0; o < outer; ++o) widen_row(from + o * stride, inner, to + o * inner);
    return static_cast<const T*>(to);
  };
  const auto finish_tangents = [&](int64_t i, const T* from) {
    uint16_t* to = rows.low_dy + i * rows.all;
    for (int64_t o = 0; o < outer; ++o) narrow_row(from + o * inner, inner, to + o * stride);
  };

  using V = typename VectorOf<T>::type;
  const T* x = rows.x;
  const double count = static_cast<double>(n);
  double mean = 0, var = 0;
  if (p.given_mean != nullptr) {
    mean = static_cast<double>(p.given_mean[g]), var = static_cast<double>(p.given_var[g]);
  } else {
    if (p.centred) {
      total<T, 1>(outer, inner, &mean,
                  [&](int64_t o, const auto& at, V* sums) { sums[0] = sums[0] + at.load(x + o * stride, V::zero()); });
      mean /= count;
    }
    const V middle = V::set(static_cast<T>(mean));
    total<T, 1>(outer, inner, &var, [&](int64_t o, const auto& at, V* sums) {
      const V distance = at.load(x + o * stride, middle) - middle;
      sums[0] = fma(distance, distance, sums[0]);
    });
    var /= count;
  }
  p.mean[g] = static_cast<T>(mean), p.var[g] = static_cast<T>(var);
  const T r = static_cast<T>(1 / __builtin_sqrt(var + p.eps));
  const V centre = V::set(static_cast<T>(mean)), scale = V::set(r);
  const Affine<T> w = affine(p, p.weight, 0, g, inner), b = affine(p, p.bias, 0, g, inner);
  for (int64_t o = 0; o < outer; ++o) {
    const T* row = x + o * stride;
    T *y = rows.y + o * stride, *h = hat + o * inner;
    for_runs(p, inner, [&](int64_t from, int64_t to, bool constant) {
      const auto factor = w.over(from, T(1), constant), add = b.over(from, T(0), constant);
      for_lanes<T>(from, to, [&](const auto& at) {
        const V normalised = (at.load(row, centre) - centre) * scale;
        at.store(normalised, h);
        at.store(fma(normalised, factor(at), add(at)), y);
      });
    });
  }
  const auto move = [&](int64_t i, auto together) {
    constexpr int N = decltype(together)::value;
    Moving<T, N> m{i, {}, in_stride, {}, out_stride};
    for (int j = 0; j < N; ++j) {
      m.dx[j] = fetch_tangents(i + j, wide + j * n);
      m.dy[j] = low_out ? result + j * n : rows.dy + (i + j) * rows.all;
    }
    move_group(p, g, outer, inner, r, hat, m);
    for (int j = 0; low_out && j < N; ++j) finish_tangents(i + j, m.dy[j]);
  };
  int64_t i = 0;
  if (tangents_together(p, n) == kTangentsTogether) {
    for (; i + kTangentsTogether <= p.k; i += kTangentsTogether) move(i, Count<kTangentsTogether>{});
  }
  for (; i < p.k; ++i) move(i, Count<1>{});
}

// Neighbouring groups are laid out anew together: so many elements of a row, and with all tangents at most so many in
// all, which stay in second-level cache.
constexpr int64_t kNormalizationStretch = 64, kNormalizationBlock = 1 << 16;

// Whether a group lies in pieces shorter than that, as in batch normalisation of small images.
template <class T>
bool in_pieces(const Normalization<T>& p) {
  return p.outer > 1 && p.inner < kNormalizationStretch && p.weight_inner <= 1;
}

// how many groups in pieces are taken together
template <class T>
int64_t taken_together(const Normalization<T>& p) {
  const int64_t wide = kNormalizationStretch / p.inner, many = kNormalizationBlock / ((1 + p.k) * p.outer * p.inner);
  return many < 1 ? 1 : many < wide ? many : wide;
}

template <class T>
int64_t normalisation_scratch(const Normalization<T>& p) {
  const int64_t n = p.outer * p.inner;
  const int64_t alone = (1 + 2 * tangents_together(p, n)) * n;
  return in_pieces(p) ? alone + (1 + p.k) * taken_together(p) * n + kNormalizationStretch : alone;
}

template <int kLength, class T>
void copy_pieces_of(int64_t count, int64_t length, const T* from, int64_t from_ld, T* to, int64_t to_ld) {
  const int64_t each = kLength > 0 ? kLength : length;
  for (int64_t c = 0; c < count; ++c) {
    for (int64_t j = 0; j < each; ++j) to[c * to_ld + j] = from[c * from_ld + j];
  }
}

// Images of 1 x 1 and 2 x 2, the most frequent, have loops whose length the compiler knows.
template <class T>
void copy_pieces(int64_t count, int64_t length, const T* from, int64_t from_ld, T* to, int64_t to_ld) {
  if (length == 1) return copy_pieces_of<1>(count, length, from, from_ld, to, to_ld);
  if (length == 4) return copy_pieces_of<4>(count, length, from, from_ld, to, to_ld);
  copy_pieces_of<0>(count, length, from, from_ld, to, to_ld);
}

// Groups [g, g + count) in short pieces. Of each row of x their pieces are one stretch of memory; [outer, count, inner]
// becomes [count, outer * inner], is normalised in place, group by group, and goes back.
template <class T>
void normalise_pieces(const Normalization<T>& p, int64_t g, int64_t count, T* scratch) {
  const int64_t n = p.outer * p.inner, all = n * p.groups, stretch = count * p.inner, stride = p.groups * p.inner;
  T *line = scratch + (1 + 2 * tangents_together(p, n)) * n, *values = line + kNormalizationStretch,
    *tangents = values + count * n;
  // row o of the groups to where it lies among those of a group, and back
  const auto take = [&](int64_t o, const T* from, T* to) {
    copy_pieces(count, p.inner, from, p.inner, to + o * p.inner, n);
  };
  const auto give = [&](int64_t o, const T* from, T* to) {
    copy_pieces(count, p.inner, from + o * p.inner, n, to, p.inner);
  };
  const bool moved = p.dx != nullptr || p.low_dx != nullptr;
  for (int64_t o = 0; o < p.outer; ++o) {
    const int64_t at = o * stride + g * p.inner;
    take(o, p.x + at, values);
    for (int64_t i = 0; moved && i < p.k; ++i) {
      if (p.low_dx != nullptr) widen_row(p.low_dx + i * all + at, stretch, line);
      take(o, p.low_dx != nullptr ? line : p.dx + i * all + at, tangents + i * count * n);
    }
  }
  for (int64_t c = 0; c < count; ++c) {
    T *x = values + c * n, *dx = tangents + c * n;
    normalise_group(p, g + c, {1, n, n, count * n, x, moved ? dx : nullptr, x, dx, nullptr, nullptr}, scratch);
  }
  for (int64_t o = 0; o < p.outer; ++o) {
    const int64_t at = o * stride + g * p.inner;
    give(o, values, p.y + at);
    for (int64_t i = 0; i < p.k; ++i) {
      give(o, tangents + i * count * n, p.low_dy != nullptr ? line : p.dy + i * all + at);
      if (p.low_dy != nullptr) narrow_row(line, stretch, p.low_dy + i * all + at);
    }
  }
}

template <class T>
void normalise_groups(const Normalization<T>& p, int64_t from, int64_t to, T* scratch) {
  if (in_pieces(p)) {
    const int64_t each = taken_together(p);
    for (int64_t g = from; g < to; g += each) normalise_pieces(p, g, to - g < each ? to - g : each, scratch);
    return;
  }
  const auto moved = [](auto* data, int64_t by) { return data == nullptr ? nullptr : data + by; };
  const int64_t stride = p.groups * p.inner;
  for (int64_t g = from; g < to; ++g) {
    const int64_t at = g * p.inner;
    normalise_group(p, g,
                    {p.outer, p.inner, stride, p.outer * stride, p.x + at, moved(p.dx, at), p.y + at, moved(p.dy, at),
                     moved(p.low_dx, at), moved(p.low_dy, at)},
                    scratch);
  }
}

}  // namespace frog::FROG_ISA
