// The vector kernels, written once over F32 and F64 of the instruction set at hand. Included by baseline.cpp, avx2.cpp
// and avx512.cpp inside their target pragma; plain loops and no standard-library templates, see kernels.h.
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

// ---- drawing

// Calls visit(i, group_start, from, to, values) for every tangent of every group that [start, start + count) touches;
// values are the group's elements in order, of which [from, to) are wanted. Tangents are the inner loop: they share
// part of Philox.
template <class Visit>
void for_each_normal_group(const DrawSpec& spec, int64_t k, int64_t start, int64_t count, const Visit& visit) {
  const Schedule schedule(spec.seed, spec.step);
  constexpr int kVectors = kNormalGroup / F32::kWidth;
  const int64_t end = start + count;
  for (int64_t group = start / kNormalGroup; group * kNormalGroup < end; ++group) {
    const int64_t base = group * kNormalGroup;
    const int64_t from = base < start ? start - base : 0;
    const int64_t to = end - base < kNormalGroup ? end - base : kNormalGroup;
    NormalGroup drawer;
    drawer.start(schedule, static_cast<uint64_t>(group));
    for (int64_t i = 0; i < k; ++i) {
      F32 values[kVectors];
      drawer.draw(schedule, static_cast<uint32_t>(spec.first + i), values);
      visit(i, base - start, from, to, values);
    }
  }
}

inline void store_part(const F32* values, int64_t from, int64_t to, float* out) {
  if (from == 0 && to == kNormalGroup) {
    for (int j = 0; j < kNormalGroup / F32::kWidth; ++j) values[j].store(out + j * F32::kWidth);
    return;
  }
  float whole[kNormalGroup];
  for (int j = 0; j < kNormalGroup / F32::kWidth; ++j) values[j].store(whole + j * F32::kWidth);
  for (int64_t j = from; j < to; ++j) out[j] = whole[j];
}

inline void store_part(const F32* values, int64_t from, int64_t to, double* out) {
  float whole[kNormalGroup];
  for (int j = 0; j < kNormalGroup / F32::kWidth; ++j) values[j].store(whole + j * F32::kWidth);
  for (int64_t j = from; j < to; ++j) out[j] = static_cast<double>(whole[j]);
}

// Calls visit(i, group_start, from, to, bits) with the 1024 sign bits of each group.
template <class Visit>
void for_each_rademacher_group(const DrawSpec& spec, int64_t k, int64_t start, int64_t count, const Visit& visit) {
  const Schedule schedule(spec.seed, spec.step);
  const int64_t end = start + count;
  for (int64_t group = start / kRademacherGroup; group * kRademacherGroup < end; ++group) {
    const int64_t base = group * kRademacherGroup;
    const int64_t from = base < start ? start - base : 0;
    const int64_t to = end - base < kRademacherGroup ? end - base : kRademacherGroup;
    RademacherGroup drawer;
    drawer.start(schedule, static_cast<uint64_t>(group));
    for (int64_t i = 0; i < k; ++i) {
      uint32_t bits[kRademacherGroup / 32];
      drawer.bits(schedule, static_cast<uint32_t>(spec.first + i), bits);
      visit(i, base - start, from, to, bits);
    }
  }
}

inline float sign_of(const uint32_t* bits, int64_t j) { return (bits[j / 32] >> (j % 32)) & 1u ? -1.0f : 1.0f; }

template <class T>
void store_signs(const uint32_t* bits, int64_t from, int64_t to, T* out) {
  int64_t j = from;
  for (; j < to && j % 32 != 0; ++j) out[j] = static_cast<T>(sign_of(bits, j));
  if constexpr (sizeof(T) == sizeof(float)) {
    for (; j + 32 <= to; j += 32) {
      for (int l = 0; l < 32; l += F32::kWidth) signs(bits, j + l).store(out + j + l);
    }
  }
  for (; j < to; ++j) out[j] = static_cast<T>(sign_of(bits, j));
}

template <class T>
void draw(const DrawSpec& spec, int64_t k, int64_t start, int64_t count, T* out, int64_t ld) {
  if (count <= 0) return;
  if (spec.distribution == kNormal) {
    for_each_normal_group(spec, k, start, count,
                          [=](int64_t i, int64_t at, int64_t from, int64_t to, const F32* values) {
                            store_part(values, from, to, out + i * ld + at);
                          });
  } else if (spec.distribution == kRademacher) {
    for_each_rademacher_group(spec, k, start, count,
                              [=](int64_t i, int64_t at, int64_t from, int64_t to, const uint32_t* bits) {
                                store_signs(bits, from, to, out + i * ld + at);
                              });
  } else {
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < count; ++j) out[i * ld + j] = T(0);
      const int64_t hit = spec.coordinates[spec.first + i] - start;
      if (hit >= 0 && hit < count) out[i * ld + hit] = T(1);
    }
  }
}

// ---- linear combinations

// values[0..64) += c * drawn, in the precision of T
inline void accumulate(const F32* drawn, float c, float* values) {
  const F32 factor = F32::set(c);
  for (int j = 0; j < kNormalGroup / F32::kWidth; ++j) {
    fma(drawn[j], factor, F32::load(values + j * F32::kWidth)).store(values + j * F32::kWidth);
  }
}
inline void accumulate(const F32* drawn, double c, double* values) {
  float whole[kNormalGroup];
  for (int j = 0; j < kNormalGroup / F32::kWidth; ++j) drawn[j].store(whole + j * F32::kWidth);
  for (int j = 0; j < kNormalGroup; ++j) values[j] += c * static_cast<double>(whole[j]);
}
inline void accumulate_signs(const uint32_t* bits, float c, float* values) {
  const F32 factor = F32::set(c);
  for (int64_t j = 0; j < kRademacherGroup; j += F32::kWidth) {
    fma(signs(bits, j), factor, F32::load(values + j)).store(values + j);
  }
}
inline void accumulate_signs(const uint32_t* bits, double c, double* values) {
  for (int64_t j = 0; j < kRademacherGroup; ++j) values[j] += c * static_cast<double>(sign_of(bits, j));
}

template <class T>
void combine(const DrawSpec& spec, int64_t k, const T* c, int64_t start, int64_t count, T* out) {
  if (count <= 0) return;
  if (spec.distribution == kStandardBasis) {
    for (int64_t j = 0; j < count; ++j) out[j] = T(0);
    for (int64_t i = 0; i < k; ++i) {
      const int64_t hit = spec.coordinates[spec.first + i] - start;
      if (hit >= 0 && hit < count) out[hit] += c[i];
    }
    return;
  }
  T values[kRademacherGroup];  // one group, summed over the tangents before it is written
  if (spec.distribution == kNormal) {
    for_each_normal_group(spec, k, start, count,
                          [&](int64_t i, int64_t at, int64_t from, int64_t to, const F32* drawn) {
                            if (i == 0) {
                              for (int64_t j = 0; j < kNormalGroup; ++j) values[j] = T(0);
                            }
                            accumulate(drawn, c[i], values);
                            if (i == k - 1) {
                              for (int64_t j = from; j < to; ++j) out[at + j] = values[j];
                            }
                          });
  } else {
    for_each_rademacher_group(spec, k, start, count,
                              [&](int64_t i, int64_t at, int64_t from, int64_t to, const uint32_t* bits) {
                                if (i == 0) {
                                  for (int64_t j = 0; j < kRademacherGroup; ++j) values[j] = T(0);
                                }
                                accumulate_signs(bits, c[i], values);
                                if (i == k - 1) {
                                  for (int64_t j = from; j < to; ++j) out[at + j] = values[j];
                                }
                              });
  }
}

// ---- Gram

// gram[a0 + a][b0 + b] += sum_j v[a0 + a][j] v[b0 + b][j] for a < A, b < B: A x B sums stay in registers.
template <class T, int A, int B>
void gram_tile(const T* v, int64_t n, int64_t ld, int64_t a0, int64_t b0, int64_t k, double* gram) {
  using V = typename VectorOf<T>::type;
  V sums[A][B];
  for (int a = 0; a < A; ++a) {
    for (int b = 0; b < B; ++b) sums[a][b] = V::zero();
  }
  int64_t j = 0;
  for (; j + V::kWidth <= n; j += V::kWidth) {
    V right[B];
    for (int b = 0; b < B; ++b) right[b] = V::load(v + (b0 + b) * ld + j);
    for (int a = 0; a < A; ++a) {
      const V left = V::load(v + (a0 + a) * ld + j);
      for (int b = 0; b < B; ++b) sums[a][b] = fma(left, right[b], sums[a][b]);
    }
  }
  for (int a = 0; a < A; ++a) {
    for (int b = 0; b < B; ++b) {
      double total = static_cast<double>(sums[a][b].sum());
      for (int64_t rest = j; rest < n; ++rest) {
        total += static_cast<double>(v[(a0 + a) * ld + rest]) * static_cast<double>(v[(b0 + b) * ld + rest]);
      }
      gram[(a0 + a) * k + b0 + b] += total;
    }
  }
}

template <class T>
void gram(const T* v, int64_t k, int64_t n, int64_t ld, double* out) {
  int64_t a = 0;
  for (; a + 4 <= k; a += 4) {
    int64_t b = 0;
    for (; b + 4 <= a + 4; b += 4) gram_tile<T, 4, 4>(v, n, ld, a, b, k, out);
  }
  for (; a < k; ++a) {
    int64_t b = 0;
    for (; b + 4 <= a + 1; b += 4) gram_tile<T, 1, 4>(v, n, ld, a, b, k, out);
    for (; b <= a; ++b) gram_tile<T, 1, 1>(v, n, ld, a, b, k, out);
  }
}

// ---- the matrix tile

// R rows of v against N vectors of xt; the sums stay in registers over the whole count.
template <class T, int R, int N>
void tile_fixed(const T* xt, int64_t width, const T* v, int64_t v_ld, int64_t count, T* acc, int64_t acc_ld) {
  using V = typename VectorOf<T>::type;
  V sums[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sums[r][n] = V::load(acc + r * acc_ld + n * V::kWidth);
  }
  for (int64_t c = 0; c < count; ++c) {
    V x[N];
    for (int n = 0; n < N; ++n) x[n] = V::load(xt + c * width + n * V::kWidth);
    for (int r = 0; r < R; ++r) {
      const V factor = V::set(v[r * v_ld + c]);
      for (int n = 0; n < N; ++n) sums[r][n] = fma(factor, x[n], sums[r][n]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sums[r][n].store(acc + r * acc_ld + n * V::kWidth);
  }
}

template <class T, int N>
void tile_rows(const T* xt, int64_t width, const T* v, int64_t v_ld, int64_t rows, int64_t count, T* acc,
               int64_t acc_ld) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) tile_fixed<T, 6, N>(xt, width, v + r * v_ld, v_ld, count, acc + r * acc_ld, acc_ld);
  for (; r + 2 <= rows; r += 2) tile_fixed<T, 2, N>(xt, width, v + r * v_ld, v_ld, count, acc + r * acc_ld, acc_ld);
  for (; r < rows; ++r) tile_fixed<T, 1, N>(xt, width, v + r * v_ld, v_ld, count, acc + r * acc_ld, acc_ld);
}

template <class T>
void tile(const T* xt, int64_t width, const T* v, int64_t v_ld, int64_t rows, int64_t count, T* acc, int64_t acc_ld) {
  using V = typename VectorOf<T>::type;
  const int64_t vectors = width / V::kWidth;
  if constexpr (kTileVectors >= 4) {
    if (vectors == 4) return tile_rows<T, 4>(xt, width, v, v_ld, rows, count, acc, acc_ld);
    if (vectors == 3) return tile_rows<T, 3>(xt, width, v, v_ld, rows, count, acc, acc_ld);
  }
  if constexpr (kTileVectors >= 2) {
    if (vectors == 2) return tile_rows<T, 2>(xt, width, v, v_ld, rows, count, acc, acc_ld);
  }
  tile_rows<T, 1>(xt, width, v, v_ld, rows, count, acc, acc_ld);
}

#define FROG_STRING_(x) #x
#define FROG_STRING(x) FROG_STRING_(x)
const SimdKernels kTable = {
    FROG_STRING(FROG_ISA),
    draw<float>,
    draw<double>,
    combine<float>,
    combine<double>,
    gram<float>,
    gram<double>,
    tile<float>,
    tile<double>,
    F32::kWidth,
    F64::kWidth,
    kTileVectors * F32::kWidth,
    kTileVectors * F64::kWidth,
};

}  // namespace frog::FROG_ISA
