// Products of a linear layer's matrices on the register tile of csrc/cpu/simd. They replace the library's where there
// are rows enough to pay for packing, because (measured, docs/performance.md) the library loses a third of the machine
// at a batch of 64 rows, writes a gradient of few rows at a quarter of the memory's speed, and knows nothing of what
// the sums should start from.
//
// Sums run over the inner dimension in order, whatever the number of threads and of rows. The library's order depends
// on the number of rows.
//
// bfloat16 (uint16_t here) is multiplied with a weight that is float32 and packed as bfloat16; sums are float32 and
// rounded once.
#pragma once

#include "draw.h"
#include "scratch.h"

namespace frog {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
using SumOf = std::conditional_t<std::is_same_v<T, uint16_t>, float, T>;

// The table's entries by element type, widths in sums.
template <class T>
inline int64_t vector_width() {
  return sizeof(T) == sizeof(double) ? simd().vector_f64 : simd().vector_f32;
}
template <class T>
inline int64_t panel_width() {
  return sizeof(T) == sizeof(double) ? simd().panel_f64 : simd().panel_f32;
}
inline void tile(const float* xt, int64_t xt_ld, int64_t width, const float* v, int64_t v_ld, int64_t rows,
                 int64_t count, float* acc, int64_t acc_ld, bool fresh) {
  simd().tile_f32(xt, xt_ld, width, v, v_ld, rows, count, acc, acc_ld, fresh);
}
inline void tile(const double* xt, int64_t xt_ld, int64_t width, const double* v, int64_t v_ld, int64_t rows,
                 int64_t count, double* acc, int64_t acc_ld, bool fresh) {
  simd().tile_f64(xt, xt_ld, width, v, v_ld, rows, count, acc, acc_ld, fresh);
}
inline void tile_listed(const float* xt, int64_t width, const float* v, int64_t v_ld, const Listed* list, int64_t rows,
                        int64_t count, float* acc, int64_t acc_ld, bool fresh) {
  simd().tile_listed_f32(xt, width, v, v_ld, list, rows, count, acc, acc_ld, fresh);
}
inline void tile_listed(const double* xt, int64_t width, const double* v, int64_t v_ld, const Listed* list,
                        int64_t rows, int64_t count, double* acc, int64_t acc_ld, bool fresh) {
  simd().tile_listed_f64(xt, width, v, v_ld, list, rows, count, acc, acc_ld, fresh);
}
/// Of a packed panel
template <class T>
void tile(const T* xt, int64_t width, const T* v, int64_t v_ld, int64_t rows, int64_t count, T* acc, int64_t acc_ld,
          bool fresh) {
  tile(xt, width, width, v, v_ld, rows, count, acc, acc_ld, fresh);
}
inline void pack(const float* x, int64_t ld, int64_t rows, int64_t count, int64_t width, float* xt) {
  simd().pack_f32(x, ld, rows, count, width, xt);
}
inline void pack(const double* x, int64_t ld, int64_t rows, int64_t count, int64_t width, double* xt) {
  simd().pack_f64(x, ld, rows, count, width, xt);
}
inline void pack(const float* x, int64_t ld, int64_t rows, int64_t count, int64_t width, uint16_t* xt) {
  simd().pack_bf16(x, ld, rows, count, width, xt);
}

/// Whether there is a register tile of several vectors; on one vector of accumulators `product` has no advantage.
template <class T>
inline bool has_tile() {
  return panel_width<T>() > vector_width<T>();
}

/// Whether `product` is the faster way for so many rows: below, packing the weight costs more than it gains.
template <class T>
inline bool tile_pays(int64_t rows) {
  constexpr int64_t kFewest = 16;
  return rows >= kFewest && has_tile<T>();
}

/// Rows of a left-hand side that lie together: a [count, in] are the rows first .. first + count of the result.
template <class T>
struct Rows {
  const T* a;
  int64_t first, count;
};

/// c [*, out] = start + a w^T for a [*, in] in one or more pieces and w [out, in]; start(row, count, o, n, to, ld)
/// writes what the sums of rows row .. row + count start from at columns o .. o + n, in rows of stride ld. With few
/// rows, a thread packs a panel of w and takes its rows through it; with many, w is packed once as a whole and a thread
/// takes a block of rows, which stays in second-level cache, through all panels, so that a comes from memory once and
/// not once for every panel.
template <class T, class Start>
void product(const std::vector<Rows<T>>& pieces, int64_t in, const SumOf<T>* w, int64_t out, T* c, const Start& start) {
  using Sum = SumOf<T>;
  constexpr bool kNarrows = sizeof(Sum) > sizeof(T);
  constexpr int64_t kBlock = 32;  // strips of kTileRows rows that stay in second-level cache
  constexpr int64_t kManyStrips = 16 * kBlock;
  constexpr int64_t kDepth = 1024;  // of a packed panel, which stays in second-level cache; not of sums to be narrowed
  constexpr int64_t kWork = int64_t{1} << 18;  // multiplications that are worth a thread
  int64_t strips = 0;                          // of all pieces, numbered one after the other
  for (const Rows<T>& piece : pieces) strips += ceil_div(piece.count, kTileRows);
  const int64_t panel = panel_width<T>(), vector = vector_width<T>();
  const int64_t depth = kNarrows ? std::max<int64_t>(1, in) : std::clamp<int64_t>(in, 1, kDepth);
  const int64_t held = kNarrows ? ceil_div(in, 2) * 2 : in;  // rows of a packed panel
  const int64_t panels = ceil_div(out, panel), vectors = ceil_div(out, vector);
  const auto width_of = [&](int64_t p) { return ceil_div(std::min(panel, out - p * panel), vector) * vector; };
  // strips first .. last through columns i0 .. i0 + n of panel p, which `packed` holds; edge [kTileRows, panel], zeros
  // at first
  const auto multiply = [&](int64_t first, int64_t last, int64_t p, int64_t i0, int64_t n, const T* packed, Sum* edge) {
    const int64_t o = p * panel, live = std::min(panel, out - o), width = width_of(p);
    for (const Rows<T>& piece : pieces) {
      const int64_t here = ceil_div(piece.count, kTileRows);
      for (int64_t s = std::max<int64_t>(first, 0); s < std::min(last, here); ++s) {
        const int64_t r = s * kTileRows, rows = std::min(kTileRows, piece.count - r);
        T* target = c + (piece.first + r) * out + o;
        const bool apart = kNarrows || live != width;  // the tile writes whole vectors of sums
        Sum* acc = apart ? edge : reinterpret_cast<Sum*>(target);
        const int64_t ld = apart ? panel : out;
        // lines of the next strip, which come from memory meanwhile
        for (int64_t j = rows; i0 == 0 && j < std::min(rows + kTileRows, piece.count - r); ++j) {
          const char* line = reinterpret_cast<const char*>(target + j * out);
          for (int64_t byte = 0; byte < live * static_cast<int64_t>(sizeof(T)); byte += 64) {
            __builtin_prefetch(line + byte, 1);
          }
        }
        if (i0 == 0) start(piece.first + r, rows, o, live, acc, ld);
        if constexpr (kNarrows) {
          simd().tile_bf16(packed, width, piece.a + r * in, in, rows, n, acc, ld, live, target, out);
        } else {
          for (int64_t j = 0; apart && i0 > 0 && j < rows; ++j) {
            std::copy(target + j * out, target + j * out + live, acc + j * ld);
          }
          tile(packed, width, piece.a + r * in + i0, in, rows, n, acc, ld, false);
          for (int64_t j = 0; apart && j < rows; ++j) {
            std::copy(acc + j * ld, acc + j * ld + live, target + j * out);
          }
        }
      }
      first -= here, last -= here;
    }
  };
  if (strips >= kManyStrips) {
    Scratch<T> packed(panels * panel * held);
    torch::stable::parallel_for(0, panels, 1, [&](int64_t from, int64_t to) {
      for (int64_t p = from; p < to; ++p) {
        const Sum* rows = w + p * panel * in;
        pack(rows, in, std::min(panel, out - p * panel), in, width_of(p), packed.data() + p * panel * held);
      }
    });
    torch::stable::parallel_for(0, strips, kBlock, [&](int64_t from, int64_t to) {
      Scratch<Sum> edge(kTileRows * panel);
      std::fill(edge.data(), edge.data() + kTileRows * panel, Sum(0));
      for (int64_t s = from; s < to; s += kBlock) {
        for (int64_t p = 0; p < panels; ++p) {
          for (int64_t i0 = 0; i0 == 0 || i0 < in; i0 += depth) {
            const T* part = packed.data() + p * panel * held + i0 * width_of(p);
            multiply(s, std::min(to, s + kBlock), p, i0, std::min(depth, in - i0), part, edge.data());
          }
        }
      }
    });
    return;
  }
  // A unit of work is a strip times a vector of columns, so that threads get equal shares though panels differ in width
  const int64_t grain = std::max<int64_t>(1, kWork / std::max<int64_t>(1, kTileRows * vector * in));
  torch::stable::parallel_for(0, strips * vectors, grain, [&](int64_t from, int64_t to) {
    Scratch<T> packed(panel * ceil_div(depth, 2) * 2);
    Scratch<Sum> edge(kTileRows * panel);
    std::fill(edge.data(), edge.data() + kTileRows * panel, Sum(0));
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t before = p * (panel / vector) * strips, units = width_of(p) / vector;
      const int64_t first = ceil_div(std::max<int64_t>(from - before, 0), units);
      const int64_t last = std::min(strips, ceil_div(to - before, units));
      if (first >= last) continue;
      for (int64_t i0 = 0; i0 == 0 || i0 < in; i0 += depth) {
        const int64_t n = std::min(depth, in - i0);
        pack(w + p * panel * in + i0, in, std::min(panel, out - p * panel), n, width_of(p), packed.data());
        multiply(first, last, p, i0, n, packed.data(), edge.data());
      }
    }
  });
}

constexpr int64_t kFewRows = 128;  // up to which outer_product is faster than the library

/// c [out, in] = g^T x for g [rows, out] and x [rows, in], few rows. Bound by writing c. Where weights [rows] are
/// given, the rows of g are multiplied by them.
template <class T>
void outer_product(const T* g, const T* x, int64_t rows, int64_t out, int64_t in, T* c, const T* weights = nullptr) {
  constexpr int64_t kPackedBytes = 256 * 1024;  // of x, in second-level cache
  constexpr int64_t kElements = 32768;          // of c that are worth a thread
  const int64_t panel = panel_width<T>(), vector = vector_width<T>();
  const int64_t fitting = kPackedBytes / (std::max<int64_t>(1, rows) * static_cast<int64_t>(sizeof(T)));
  const int64_t columns = std::max(panel, fitting / panel * panel);
  for (int64_t i0 = 0; i0 < in; i0 += columns) {
    const int64_t wide = std::min(columns, in - i0);
    Scratch<T> packed(ceil_div(wide, vector) * vector * rows);  // panels [rows, width]
    for (int64_t i = 0; i < wide; i += panel) {
      const int64_t live = std::min(panel, wide - i), width = ceil_div(live, vector) * vector;
      for (int64_t r = 0; r < rows; ++r) {
        T* to = packed.data() + i * rows + r * width;
        std::copy(x + r * in + i0 + i, x + r * in + i0 + i + live, to);
        std::fill(to + live, to + width, T(0));
      }
    }
    const int64_t grain = std::max<int64_t>(1, kElements / (kTileRows * wide));
    torch::stable::parallel_for(0, ceil_div(out, kTileRows), grain, [&](int64_t from, int64_t to) {
      Scratch<T> left(kTileRows * rows), edge(kTileRows * panel);
      for (int64_t o = from * kTileRows; o < std::min(out, to * kTileRows); o += kTileRows) {
        const int64_t strip = std::min(kTileRows, out - o);
        for (int64_t j = 0; j < strip; ++j) {
          for (int64_t r = 0; r < rows; ++r) {
            const T value = g[r * out + o + j];
            left.data()[j * rows + r] = weights ? weights[r] * value : value;
          }
        }
        for (int64_t i = 0; i < wide; i += panel) {
          const int64_t live = std::min(panel, wide - i), width = ceil_div(live, vector) * vector;
          T* target = c + o * in + i0 + i;
          T* acc = live == width ? target : edge.data();
          const int64_t ld = live == width ? in : panel;
          tile(packed.data() + i * rows, width, left.data(), rows, strip, rows, acc, ld, true);
          for (int64_t j = 0; acc != target && j < strip; ++j) {
            std::copy(acc + j * ld, acc + j * ld + live, target + j * in);
          }
        }
      }
    });
  }
}

}  // namespace frog
