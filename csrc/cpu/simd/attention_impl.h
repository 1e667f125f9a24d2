// One step of online softmax (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018) with tangents.
// Included by each instruction set inside its target pragma, after math_impl.h.
#pragma once

namespace frog::FROG_ISA {

// scores [1 + k, rows, ld]: of each query row the scores s against `count` keys, then their k tangents ds_i; they
// become p = exp(s - max) and p ds_i. max and sum [rows] are the running maximum and normaliser, shift [k, rows] the
// running sums of p ds_i; those of earlier keys are brought to the new maximum by correction [rows], which the caller
// applies to its own sums. A row that has met no finite score has max -inf and p = 0.
template <class T>
void attend(T* scores, int64_t rows, int64_t k, int64_t count, int64_t ld, T* max_, T* sum, T* shift, T* correction) {
  using V = typename VectorOf<T>::type;
  const V lowest = V::set(-static_cast<T>(__builtin_inf()));
  for (int64_t r = 0; r < rows; ++r) {
    T* s = scores + r * ld;
    T lanes[V::kWidth];
    V top = V::set(max_[r]);
    for_each_vector<V>(count, [&](int64_t j, int64_t m) { top = max(load_up_to(s + j, m, lowest), top); });
    top.store(lanes);
    for (int l = 1; l < V::kWidth; ++l) lanes[0] = lanes[l] > lanes[0] ? lanes[l] : lanes[0];
    const T best = lanes[0], base = best == -static_cast<T>(__builtin_inf()) ? T(0) : best;

    exp(V::set(max_[r] - base)).store(lanes);  // 0 before the first finite score, when there is nothing to correct
    correction[r] = lanes[0];
    max_[r] = best;
    V total = V::zero();
    for_each_vector<V>(count, [&](int64_t j, int64_t m) {
      const V p = exp(load_up_to(s + j, m, lowest) - V::set(base));  // 0 beyond the end
      total = total + p;
      store_up_to(p, s + j, m);
    });
    sum[r] = sum[r] * correction[r] + total.sum();

    for (int64_t i = 0; i < k; ++i) {
      T* ds = scores + ((1 + i) * rows + r) * ld;
      V moved = V::zero();
      for_each_vector<V>(count, [&](int64_t j, int64_t m) {
        const V product = load_up_to(ds + j, m, V::zero()) * load_up_to(s + j, m, V::zero());
        moved = moved + product;
        store_up_to(product, ds + j, m);
      });
      shift[i * rows + r] = shift[i * rows + r] * correction[r] + moved.sum();
    }
  }
}

// out [groups, rows, width] times correction [rows]
template <class T>
void rescale(T* out, int64_t groups, int64_t rows, int64_t width, const T* correction) {
  for (int64_t r = 0; r < rows; ++r) {
    if (correction[r] == T(1)) continue;
    for (int64_t g = 0; g < groups; ++g) {
      T* row = out + (g * rows + r) * width;
      for (int64_t j = 0; j < width; ++j) row[j] *= correction[r];
    }
  }
}

}  // namespace frog::FROG_ISA
