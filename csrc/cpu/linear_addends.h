// What linear_jvp adds to its products, row by row of the buffer [1 + k, rows, out].
#pragma once

#include "../stable_compat.h"

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
    const int64_t i = row / rows - 1, s = row % rows;
    const T* first = i < 0 ? bias : dbias ? dbias + i * out : nullptr;
    const T* second = i >= 0 && activity ? activity + (i * period + s % period) * out : nullptr;
    if (!first) std::swap(first, second);
    if (second) {
      for (int64_t j = 0; j < n; ++j) to[j] = first[o + j] + second[o + j];
    } else if (first) {
      std::copy(first + o, first + o + n, to);
    } else {
      std::fill(to, to + n, T(0));
    }
    for (int64_t m = 0; i >= 0 && left && m < r; ++m) {
      const T factor = inner[(s * k + i) * r + m];
      const T* direction = left + (i * r + m) * out + o;
      for (int64_t j = 0; j < n; ++j) to[j] += factor * direction[j];
    }
  }
};

/// Rows from .. to of c [*, out]: += the addends, or = where `fresh`
template <class T>
void add_rows(const Addends<T>& addends, int64_t from, int64_t to, bool fresh, T* c) {
  const int64_t out = addends.out, grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, out));
  torch::stable::parallel_for(from, to, grain, [&](int64_t first, int64_t last) {
    std::vector<T> row(fresh ? 0 : out);
    for (int64_t r = first; r < last; ++r) {
      T* target = c + r * out;
      addends.start(r, 0, out, fresh ? target : row.data());
      for (int64_t o = 0; !fresh && o < out; ++o) target[o] += row[o];
    }
  });
}

}  // namespace frog
