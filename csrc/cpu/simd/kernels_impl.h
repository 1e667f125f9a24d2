// The vector kernels, written once over F32 and F64 of the instruction set at hand. Included by baseline.cpp, avx2.cpp
// and avx512.cpp inside their target pragma; plain loops and no standard-library templates, see kernels.h.
#pragma once

namespace frog::FROG_ISA {

// ---- drawing

// A tangent's part of a group: elements [from, to) of it are wanted; the group starts at element `at`, counted from the
// start of the range asked for.
struct Part {
  int64_t i, at, from, to;
};

// Calls visit(parts, words, n) until every tangent of every group that [start, start + count) touches was seen, n <=
// kBatch at a time, tangents innermost: they share part of Philox. A batch of words is drawn before it is visited:
// Philox waits for integer products and visits for other units, so each is faster among its own kind.
template <int64_t kGroup, int kBatch, class Visit>
void for_each_batch(const DrawSpec& spec, int64_t k, int64_t start, int64_t count, const Visit& visit) {
  constexpr int kTogether = 4;
  static_assert(kBatch % kTogether == 0, "a batch holds whole runs of tangents");
  const Schedule schedule(spec.seed, spec.step);
  Part parts[kBatch];
  GroupWords words[kBatch];
  int n = 0;
  const int64_t end = start + count;
  for (int64_t group = start / kGroup; group * kGroup < end; ++group) {
    const int64_t base = group * kGroup;
    const int64_t from = base < start ? start - base : 0;
    const int64_t to = end - base < kGroup ? end - base : kGroup;
    PhiloxGroup drawer;
    drawer.start(schedule, static_cast<uint64_t>(group));
    for (int64_t i = 0; i < k;) {
      const uint32_t tangent = static_cast<uint32_t>(spec.first + i);
      if (k - i >= kTogether && n + kTogether <= kBatch) {
        drawer.template words<kTogether>(schedule, tangent, words + n);
#pragma GCC unroll 4
        for (int j = 0; j < kTogether; ++j) parts[n + j] = {i + j, base - start, from, to};
        n += kTogether;
        i += kTogether;
      } else {
        drawer.template words<1>(schedule, tangent, words + n);
        parts[n++] = {i++, base - start, from, to};
      }
      if (n == kBatch) {
        visit(parts, words, n);
        n = 0;
      }
    }
  }
  if (n > 0) visit(parts, words, n);
}

// visit(part, values) with the 64 elements of each group
template <class Visit>
void for_each_normal_group(const DrawSpec& spec, int64_t k, int64_t start, int64_t count, const Visit& visit) {
  for_each_batch<kNormalGroup, 16>(spec, k, start, count, [&](const Part* parts, const GroupWords* words, int n) {
    for (int j = 0; j < n; ++j) {
      F32 values[kNormalGroup / F32::kWidth];
      normals(words[j], values);
      visit(parts[j], values);
    }
  });
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

inline float sign_of(const GroupWords& words, int64_t j) { return (words.w[j / 32] >> (j % 32)) & 1u ? -1.0f : 1.0f; }

template <class T>
void store_signs_part(const GroupWords& words, int64_t from, int64_t to, T* out) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (from == 0 && to == kRademacherGroup) {  // known bounds: no counting between stores, which bound the draw
      for (int j = 0; j < kRademacherGroup / 32; ++j) store_signs(words.w[j], out + 32 * j);
      return;
    }
  }
  int64_t j = from;
  for (; j < to && j % 32 != 0; ++j) out[j] = static_cast<T>(sign_of(words, j));
  if constexpr (sizeof(T) == sizeof(float)) {
    for (; j + 32 <= to; j += 32) store_signs(words.w[j / 32], out + j);
  }
  for (; j < to; ++j) out[j] = static_cast<T>(sign_of(words, j));
}

template <class T>
void draw(const DrawSpec& spec, int64_t k, int64_t start, int64_t count, T* out, int64_t ld) {
  if (count <= 0) return;
  if (spec.distribution == kNormal) {
    for_each_normal_group(spec, k, start, count, [=](const Part& part, const F32* values) {
      store_part(values, part.from, part.to, out + part.i * ld + part.at);
    });
  } else if (spec.distribution == kRademacher) {
    for_each_batch<kRademacherGroup, 4>(spec, k, start, count, [=](const Part* parts, const GroupWords* words, int n) {
      for (int j = 0; j < n; ++j) {
        store_signs_part(words[j], parts[j].from, parts[j].to, out + parts[j].i * ld + parts[j].at);
      }
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
// values[0..1024) += sum over N tangents of c * drawn, one after the other
template <int N>
inline void accumulate_signs(const GroupWords* words, const float* c, float* values) {
  F32 factors[N];
  for (int n = 0; n < N; ++n) factors[n] = F32::set(c[n]);
  for (int64_t word = 0; word < kRademacherGroup; word += 32) {
    for (int64_t j = word; j < word + 32; j += F32::kWidth) {
      F32 sum = F32::load(values + j);
      for (int n = 0; n < N; ++n) sum = add(sum, signed_by(words[n], j, factors[n]));
      sum.store(values + j);
    }
  }
}
template <int N>
inline void accumulate_signs(const GroupWords* words, const double* c, double* values) {
  for (int64_t j = 0; j < kRademacherGroup; ++j) {
    for (int n = 0; n < N; ++n) values[j] += sign_of(words[n], j) < 0 ? -c[n] : c[n];
  }
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
    for_each_normal_group(spec, k, start, count, [&](const Part& part, const F32* drawn) {
      if (part.i == 0) {
        for (int64_t j = 0; j < kNormalGroup; ++j) values[j] = T(0);
      }
      accumulate(drawn, c[part.i], values);
      if (part.i == k - 1) {
        for (int64_t j = part.from; j < part.to; ++j) out[part.at + j] = values[j];
      }
    });
    return;
  }
  for_each_batch<kRademacherGroup, 4>(spec, k, start, count, [&](const Part* parts, const GroupWords* words, int n) {
    for (int done = 0; done < n;) {
      const Part& part = parts[done];
      if (part.i == 0) {
        for (int64_t j = 0; j < kRademacherGroup; ++j) values[j] = T(0);
      }
      const bool four = done + 4 <= n && parts[done + 3].at == part.at;  // four tangents of one group
      if (four) {
        accumulate_signs<4>(words + done, c + part.i, values);
      } else {
        accumulate_signs<1>(words + done, c + part.i, values);
      }
      done += four ? 4 : 1;
      if (parts[done - 1].i == k - 1) {
        for (int64_t j = part.from; j < part.to; ++j) out[part.at + j] = values[j];
      }
    }
  });
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

// Bits from .. to of 64, those of them that there are.
inline uint64_t bits_between(int64_t from, int64_t to) {
  const uint64_t below = to >= 64 ? ~uint64_t{0} : to <= 0 ? 0 : ~uint64_t{0} >> (64 - to);
  return from >= 64 ? 0 : from <= 0 ? below : below & (~uint64_t{0} << from);
}

// The Gram matrix of signs counts where they differ: 64 products are an exclusive or and a population count, and exact.
inline void gram_of_signs(const DrawSpec& spec, int64_t k, int64_t start, int64_t count, uint64_t* signs,
                          double* gram) {
  static_assert(64 * kSignWords == kRademacherGroup, "words hold the signs of a whole group");
  for_each_batch<kRademacherGroup, 4>(spec, k, start, count, [&](const Part* parts, const GroupWords* words, int n) {
    for (int p = 0; p < n; ++p) {
      const Part& part = parts[p];
      for (int64_t w = 0; w < kSignWords; ++w) {
        const uint64_t both = words[p].w[2 * w] | static_cast<uint64_t>(words[p].w[2 * w + 1]) << 32;
        signs[part.i * kSignWords + w] = both & bits_between(part.from - 64 * w, part.to - 64 * w);
      }
      for (int64_t a = 0; part.i == k - 1 && a < k; ++a) {  // all tangents of the group are there
        const uint64_t* left = signs + a * kSignWords;
        for (int64_t b = 0; b <= a; ++b) {
          const uint64_t* right = signs + b * kSignWords;
          int64_t differing = 0;
          for (int64_t w = 0; w < kSignWords; ++w) differing += __builtin_popcountll(left[w] ^ right[w]);
          gram[a * k + b] += static_cast<double>(part.to - part.from - 2 * differing);
        }
      }
    }
  });
}

// ---- the matrix tile

// R rows of v against N vectors of xt; the sums stay in registers over the whole count. Row c of xt meets column c of
// v, or what list[c] says.
template <class T, int R, int N, bool kListed>
void tile_fixed(const T* xt, int64_t xt_ld, const T* v, int64_t v_ld, const Listed* list, int64_t count, T* acc,
                int64_t acc_ld, bool fresh) {
  using V = typename VectorOf<T>::type;
  V sums[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sums[r][n] = fresh ? V::zero() : V::load(acc + r * acc_ld + n * V::kWidth);
  }
  for (int64_t c = 0; c < count; ++c) {
    V x[N];
    const T* row = xt + (kListed ? list[c].x : c * xt_ld);
    for (int n = 0; n < N; ++n) x[n] = V::load(row + n * V::kWidth);
    const int64_t column = kListed ? list[c].v : c;
    for (int r = 0; r < R; ++r) {
      const V factor = V::set(v[r * v_ld + column]);
      for (int n = 0; n < N; ++n) sums[r][n] = fma(factor, x[n], sums[r][n]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sums[r][n].store(acc + r * acc_ld + n * V::kWidth);
  }
}

template <class T, int N, bool kListed>
void tile_rows(const T* xt, int64_t xt_ld, const T* v, int64_t v_ld, const Listed* list, int64_t rows, int64_t count,
               T* acc, int64_t acc_ld, bool fresh) {
  int64_t r = 0;
  const auto take = [&](auto tile, int taken) {
    tile(xt, xt_ld, v + r * v_ld, v_ld, list, count, acc + r * acc_ld, acc_ld, fresh);
    r += taken;
  };
  while (r + 6 <= rows) take(tile_fixed<T, 6, N, kListed>, 6);
  if (r + 4 <= rows) take(tile_fixed<T, 4, N, kListed>, 4);
  if (r + 2 <= rows) take(tile_fixed<T, 2, N, kListed>, 2);
  if (r < rows) take(tile_fixed<T, 1, N, kListed>, 1);
}

template <class T, bool kListed>
void tile_width(const T* xt, int64_t xt_ld, int64_t width, const T* v, int64_t v_ld, const Listed* list, int64_t rows,
                int64_t count, T* acc, int64_t acc_ld, bool fresh) {
  const int64_t vectors = width / VectorOf<T>::type::kWidth;
  if constexpr (kTileVectors >= 4) {
    if (vectors == 4) return tile_rows<T, 4, kListed>(xt, xt_ld, v, v_ld, list, rows, count, acc, acc_ld, fresh);
    if (vectors == 3) return tile_rows<T, 3, kListed>(xt, xt_ld, v, v_ld, list, rows, count, acc, acc_ld, fresh);
  }
  if constexpr (kTileVectors >= 2) {
    if (vectors == 2) return tile_rows<T, 2, kListed>(xt, xt_ld, v, v_ld, list, rows, count, acc, acc_ld, fresh);
  }
  tile_rows<T, 1, kListed>(xt, xt_ld, v, v_ld, list, rows, count, acc, acc_ld, fresh);
}

template <class T>
void tile(const T* xt, int64_t xt_ld, int64_t width, const T* v, int64_t v_ld, int64_t rows, int64_t count, T* acc,
          int64_t acc_ld, bool fresh) {
  tile_width<T, false>(xt, xt_ld, width, v, v_ld, nullptr, rows, count, acc, acc_ld, fresh);
}

template <class T>
void tile_listed(const T* xt, int64_t width, const T* v, int64_t v_ld, const Listed* list, int64_t rows, int64_t count,
                 T* acc, int64_t acc_ld, bool fresh) {
  tile_width<T, true>(xt, 0, width, v, v_ld, list, rows, count, acc, acc_ld, fresh);
}

// to[c * to_ld + r] = from[r * ld + c] for a square as wide as a vector
template <class T>
inline void transpose(const T* from, int64_t ld, T* to, int64_t to_ld) {
  constexpr int kWidth = VectorOf<T>::type::kWidth;
  if constexpr (kTransposesFloats && sizeof(T) == sizeof(float)) {
    transpose_floats(from, ld, to, to_ld);
  } else {
    for (int c = 0; c < kWidth; ++c) {
      for (int r = 0; r < kWidth; ++r) to[c * to_ld + r] = from[r * ld + c];
    }
  }
}

template <class T>
void pack(const T* x, int64_t ld, int64_t rows, int64_t count, int64_t width, T* xt) {
  constexpr int kWidth = VectorOf<T>::type::kWidth;
  for (int64_t r0 = 0; r0 < width; r0 += kWidth) {
    int64_t c = 0;
    if (r0 + kWidth <= rows) {
      for (; c + kWidth <= count; c += kWidth) transpose(x + r0 * ld + c, ld, xt + c * width + r0, width);
    }
    for (; c < count; ++c) {
      for (int64_t r = r0; r < r0 + kWidth; ++r) xt[c * width + r] = r < rows ? x[r * ld + c] : T(0);
    }
  }
}

#if FROG_BF16_TILE
constexpr auto kBf16Tile = bf16_tile;
constexpr auto kBf16Pack = bf16_pack;
#else
constexpr decltype(SimdKernels::tile_bf16) kBf16Tile = nullptr;
constexpr decltype(SimdKernels::pack_bf16) kBf16Pack = nullptr;
#endif

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
    gram_of_signs,
    tile<float>,
    tile<double>,
    tile_listed<float>,
    tile_listed<double>,
    pack<float>,
    pack<double>,
    kBf16Tile,
    kBf16Pack,
    attend<float>,
    attend<double>,
    rescale<float>,
    rescale<double>,
    normalise_groups<float>,
    normalise_groups<double>,
    normalisation_scratch<float>,
    normalisation_scratch<double>,
    largest<float>,
    largest<double>,
    F32::kWidth,
    F64::kWidth,
    kTileVectors * F32::kWidth,
    kTileVectors * F64::kWidth,
    math_kernels<float>(),
    math_kernels<double>(),
    widen_bf16,
    narrow_bf16,
    kWidenHalf,
    kNarrowHalf,
};

}  // namespace frog::FROG_ISA
