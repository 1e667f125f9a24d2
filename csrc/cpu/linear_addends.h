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
  /// `to` [n] becomes the addends of a row at columns o .. o + n.
  void start(int64_t row, int64_t o, int64_t n, T* to) const {
    const int64_t i = row / rows - 1;
    auto [first, second] = stored(row, o);
    if (!first) std::swap(first, second);
    if (first) {
      std::copy(first, first + n, to);
    } else {
      std::fill(to, to + n, T(0));
    }
    if (second) math<T>().add_scaled(second, T(1), n, to);
    if (i >= 0 && left) add_low_rank(i, row % rows, o, n, to);
  }
  /// `to` [n] += the addends of a row at columns o .. o + n.
  void add(int64_t row, int64_t o, int64_t n, T* to) const {
    const int64_t i = row / rows - 1;
    for (const T* from : stored(row, o)) {
      if (from) math<T>().add_scaled(from, T(1), n, to);
    }
    if (i >= 0 && left) add_low_rank(i, row % rows, o, n, to);
  }

 private:
  /// Those that lie in memory, from column o on; null where not given.
  std::array<const T*, 2> stored(int64_t row, int64_t o) const {
    const int64_t i = row / rows - 1, s = row % rows;
    if (i < 0) return {bias ? bias + o : nullptr, nullptr};
    return {dbias ? dbias + i * out + o : nullptr, activity ? activity + (i * period + s % period) * out + o : nullptr};
  }
  void add_low_rank(int64_t i, int64_t s, int64_t o, int64_t n, T* to) const {
    for (int64_t m = 0; m < r; ++m) {
      math<T>().add_scaled(left + (i * r + m) * out + o, inner[(s * k + i) * r + m], n, to);
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
        addends.start(r, 0, out, c + r * out);
      } else {
        addends.add(r, 0, out, c + r * out);
      }
    }
  });
}

}  // namespace frog
