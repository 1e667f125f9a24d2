// What linear_jvp adds to its products, row by row of the buffer [1 + k, rows, out].
#pragma once

#include <array>

#include "blocks.h"

namespace frog {

template <class T>
struct Addends {
  int64_t rows, out, period;
  const T *bias, *dbias, *activity;  // [out], [k, out], [k, period, out], each null where not given
  const T *left, *inner;             // [k, r, out], [rows, k, r]: dW_i = left_i^T right_i, and x right_i^T
  int64_t k, r;

  /// Whether the tangents have any.
  bool moves() const { return dbias || activity || left; }
  bool any() const { return bias || moves(); }
  /// `to` [count, n], of row stride ld, becomes the addends of rows row .. row + count at columns o .. o + n.
  void start(int64_t row, int64_t count, int64_t o, int64_t n, T* to, int64_t ld) const {
    for_each_tangent(row, count, [&](int64_t i, int64_t s, int64_t run, int64_t j) {
      T* sums = to + j * ld;
      int64_t phase = i >= 0 && activity ? s % period : 0;
      for (int64_t l = 0; l < run; ++l, phase = phase + 1 == period ? 0 : phase + 1) {
        auto [first, second] = stored(i, phase, o);
        if (!first) std::swap(first, second);
        if (first) {
          std::copy(first, first + n, sums + l * ld);
        } else {
          std::fill(sums + l * ld, sums + l * ld + n, T(0));
        }
        if (second) math<T>().add_scaled(second, T(1), n, sums + l * ld);
      }
      if (i >= 0 && left) add_low_rank(i, s, run, o, n, sums, ld);
    });
  }
  /// `to` [n] += the addends of a row at columns o .. o + n.
  void add(int64_t row, int64_t o, int64_t n, T* to) const {
    const int64_t i = row / rows - 1, s = row % rows;
    for (const T* from : stored(i, s % period, o)) {
      if (from) math<T>().add_scaled(from, T(1), n, to);
    }
    if (i >= 0 && left) add_low_rank(i, s, 1, o, n, to, n);
  }

 private:
  /// f(i, s, run, j) for row + j .. row + j + run, which are rows s .. s + run of tangent i, or of the primal for -1
  template <class F>
  void for_each_tangent(int64_t row, int64_t count, const F& f) const {
    int64_t i = row / rows - 1, s = row % rows;
    for (int64_t j = 0; j < count; ++i, s = 0) {
      const int64_t run = std::min(count - j, rows - s);
      f(i, s, run, j);
      j += run;
    }
  }
  /// Those that lie in memory, from column o on; null where not given.
  std::array<const T*, 2> stored(int64_t i, int64_t phase, int64_t o) const {
    if (i < 0) return {bias ? bias + o : nullptr, nullptr};
    return {dbias ? dbias + i * out + o : nullptr, activity ? activity + (i * period + phase) * out + o : nullptr};
  }
  /// Rows s .. s + count of tangent i
  void add_low_rank(int64_t i, int64_t s, int64_t count, int64_t o, int64_t n, T* to, int64_t ld) const {
    const T *factors = left + i * r * out + o, *scales = inner + (s * k + i) * r;
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t m = 0; m < r; ++m) math<T>().add_scaled(factors + m * out, scales[j * k * r + m], n, to + j * ld);
    }
  }
};

/// Rows from .. to of c [*, out]: += the addends, or = where `fresh`
template <class T>
void add_rows(const Addends<T>& addends, int64_t from, int64_t to, bool fresh, T* c) {
  const int64_t out = addends.out, grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, out));
  torch::stable::parallel_for(from, to, grain, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      if (fresh) {
        addends.start(r, 1, 0, out, c + r * out, out);
      } else {
        addends.add(r, 0, out, c + r * out);
      }
    }
  });
}

}  // namespace frog
