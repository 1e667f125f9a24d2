// Statistics and tangents of one group of a normalisation (csrc/cpu/normalization.cpp). Included by each instruction
// set inside its target pragma; plain loops that the compiler vectorises, and no standard-library templates, see
// kernels.h.
#pragma once

namespace frog::FROG_ISA {

constexpr int64_t kNormalizationRun = 4096;  // elements summed in T before they enter the double sums

// sum of f(j) over j < n: independent partial sums for the compiler to vectorise, long runs closed in double
template <class T, class F>
double total(int64_t n, const F& f) {
  constexpr int kLanes = 64 / sizeof(T);
  double sum = 0;
  for (int64_t start = 0; start < n; start += kNormalizationRun) {
    const int64_t end = n - start < kNormalizationRun ? n : start + kNormalizationRun;
    T lanes[kLanes] = {};
    int64_t j = start;
    for (; j + kLanes <= end; j += kLanes) {
      for (int l = 0; l < kLanes; ++l) lanes[l] += f(j + l);
    }
    for (; j < end; ++j) sum += static_cast<double>(f(j));
    for (int l = 0; l < kLanes; ++l) sum += static_cast<double>(lanes[l]);
  }
  return sum;
}

// Factors of the elements of a group: constant over runs of `inner / weight_inner` elements, or over the whole group.
template <class T>
struct Affine {
  const T* values;  // [weight_inner] of this group, or null
  int64_t run;
  T at(int64_t j, T otherwise) const { return values == nullptr ? otherwise : values[j / run]; }
};

template <class T>
Affine<T> affine(const Normalization<T>& p, const T* values, int64_t set, int64_t g) {
  if (values == nullptr) return {nullptr, 1};
  const int64_t run = p.weight_inner == 0 ? p.inner : p.inner / p.weight_inner;
  return {values + (set * p.weight_groups + g % p.weight_groups) * p.weight_inner, run < 1 ? 1 : run};
}

// Calls body(from, to) for the runs of [0, inner) over which every factor is constant; one run for each element where
// weight_inner == inner would be slow, so that case gets the whole range and `constant` = false.
template <class T, class Body>
void for_runs(const Normalization<T>& p, const Body& body) {
  if (p.weight_inner == p.inner || p.weight_inner == 0) return body(int64_t{0}, p.inner, p.weight_inner <= 1);
  const int64_t run = p.inner / p.weight_inner;
  for (int64_t from = 0; from < p.inner; from += run) body(from, from + run, true);
}

inline void widen_row(const uint16_t* from, int64_t n, float* to) { widen_bf16(from, n, to); }
inline void widen_row(const uint16_t*, int64_t, double*) {}  // tangents of a double x are converted beforehand
inline void narrow_row(const float* from, int64_t n, uint16_t* to) { narrow_bf16(from, n, to); }
inline void narrow_row(const double*, int64_t, uint16_t*) {}

// scratch [3, outer * inner]: x^, and where a group lies in short pieces or in bfloat16, what is read and written.
template <class T>
void normalise_group(const Normalization<T>& p, int64_t g, T* scratch) {
  constexpr int64_t kShort = 64;
  const int64_t n = p.outer * p.inner, all = n * p.groups;
  const bool pieces = p.outer > 1 && p.inner < kShort && p.weight_inner <= 1;
  const int64_t outer = pieces ? 1 : p.outer, inner = pieces ? n : p.inner, stride = p.groups * p.inner;
  T *hat = scratch, *whole = scratch + n, *result = scratch + 2 * n;
  // the group of a tensor that starts at `base`; rows of `inner` elements are `stride` apart
  const auto fetch = [&](const T* base) {
    const T* from = base + g * p.inner;
    if (!pieces) return from;
    for (int64_t o = 0; o < p.outer; ++o) {
      for (int64_t j = 0; j < p.inner; ++j) whole[o * p.inner + j] = from[o * stride + j];
    }
    return static_cast<const T*>(whole);
  };
  const auto place = [&](T* base) { return pieces ? result : base + g * p.inner; };
  const auto finish = [&](T* base) {
    T* to = base + g * p.inner;
    for (int64_t o = 0; pieces && o < p.outer; ++o) {
      for (int64_t j = 0; j < p.inner; ++j) to[o * stride + j] = result[o * p.inner + j];
    }
  };
  // the same for tangents, which may be in bfloat16: then a row of a group follows the one before
  const bool low_in = p.low_dx != nullptr, low_out = p.low_dy != nullptr;
  const int64_t in_stride = low_in ? inner : stride, out_stride = low_out ? inner : stride;
  const auto fetch_tangents = [&](int64_t i) {
    if (!low_in) return p.dx == nullptr ? nullptr : fetch(p.dx + i * all);
    const uint16_t* from = p.low_dx + i * all + g * p.inner;
    for (int64_t o = 0; o < p.outer; ++o) widen_row(from + o * stride, p.inner, whole + o * p.inner);
    return static_cast<const T*>(whole);
  };
  const auto place_tangents = [&](int64_t i) { return low_out ? result : place(p.dy + i * all); };
  const auto finish_tangents = [&](int64_t i) {
    if (!low_out) return finish(p.dy + i * all);
    uint16_t* to = p.low_dy + i * all + g * p.inner;
    for (int64_t o = 0; o < p.outer; ++o) narrow_row(result + o * p.inner, p.inner, to + o * stride);
  };
  const auto runs = [&](const auto& body) {
    if (pieces) return body(int64_t{0}, n, true);
    for_runs(p, body);
  };

  const T* x = fetch(p.x);
  double mean = 0, var = 0;
  if (p.given_mean != nullptr) {
    mean = static_cast<double>(p.given_mean[g]), var = static_cast<double>(p.given_var[g]);
  } else {
    if (p.centred) {
      for (int64_t o = 0; o < outer; ++o) {
        const T* row = x + o * stride;
        mean += total<T>(inner, [=](int64_t j) { return row[j]; });
      }
      mean /= static_cast<double>(n);
    }
    const T centre = static_cast<T>(mean);
    for (int64_t o = 0; o < outer; ++o) {
      const T* row = x + o * stride;
      var += total<T>(inner, [=](int64_t j) { return (row[j] - centre) * (row[j] - centre); });
    }
    var /= static_cast<double>(n);
  }
  p.mean[g] = static_cast<T>(mean), p.var[g] = static_cast<T>(var);
  const T centre = static_cast<T>(mean), r = static_cast<T>(1 / __builtin_sqrt(var + p.eps));
  const Affine<T> w = affine(p, p.weight, 0, g), b = affine(p, p.bias, 0, g);
  T* values = place(p.y);
  for (int64_t o = 0; o < outer; ++o) {
    const T* row = x + o * stride;
    T* y = values + o * stride;
    T* h = hat + o * inner;
    for (int64_t j = 0; j < inner; ++j) h[j] = (row[j] - centre) * r;
    runs([&](int64_t from, int64_t to, bool constant) {
      if (constant) {
        const T factor = w.at(from, T(1)), add = b.at(from, T(0));
        for (int64_t j = from; j < to; ++j) y[j] = h[j] * factor + add;
      } else {
        for (int64_t j = from; j < to; ++j) {
          y[j] = h[j] * (w.values ? w.values[j] : T(1)) + (b.values ? b.values[j] : T(0));
        }
      }
    });
  }
  finish(p.y);
  for (int64_t i = 0; i < p.k; ++i) {
    const T* moved = fetch_tangents(i);
    T* tangents = place_tangents(i);
    T shift = T(0), turn = T(0);  // mean(dx) and mean(dx x^)
    if (moved != nullptr && p.given_mean == nullptr) {
      double sum = 0, product = 0;
      for (int64_t o = 0; o < outer; ++o) {
        const T* dx = moved + o * in_stride;
        const T* h = hat + o * inner;
        if (p.centred) sum += total<T>(inner, [=](int64_t j) { return dx[j]; });
        product += total<T>(inner, [=](int64_t j) { return dx[j] * h[j]; });
      }
      shift = static_cast<T>(sum / static_cast<double>(n)), turn = static_cast<T>(product / static_cast<double>(n));
    }
    const Affine<T> dw = affine(p, p.dweight, i, g), db = affine(p, p.dbias, i, g);
    for (int64_t o = 0; o < outer; ++o) {
      const T* dx = moved == nullptr ? nullptr : moved + o * in_stride;
      T* dy = tangents + o * out_stride;
      const T* h = hat + o * inner;
      runs([&](int64_t from, int64_t to, bool constant) {
        if (constant) {
          const T factor = w.at(from, T(1)) * r, tilt = dw.at(from, T(0)), add = db.at(from, T(0));
          if (dx == nullptr) {
            for (int64_t j = from; j < to; ++j) dy[j] = tilt * h[j] + add;
          } else {
            for (int64_t j = from; j < to; ++j) dy[j] = factor * (dx[j] - shift - turn * h[j]) + (tilt * h[j] + add);
          }
          return;
        }
        if (dx != nullptr && w.values != nullptr) {
          for (int64_t j = from; j < to; ++j) dy[j] = w.values[j] * (r * (dx[j] - shift - turn * h[j]));
        } else {
          for (int64_t j = from; j < to; ++j) dy[j] = dx == nullptr ? T(0) : r * (dx[j] - shift - turn * h[j]);
        }
        if (dw.values) {
          for (int64_t j = from; j < to; ++j) dy[j] += dw.values[j] * h[j];
        }
        if (db.values) {
          for (int64_t j = from; j < to; ++j) dy[j] += db.values[j];
        }
      });
    }
    finish_tangents(i);
  }
}

}  // namespace frog::FROG_ISA
