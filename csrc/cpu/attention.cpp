// attention_jvp: out = softmax(scale Q K^T + mask) V and its k tangents, blocked, with online softmax. T x T is never
// in memory: extra memory is that of K and V and their tangents (packed), plus a few hundred KiB for each thread.
//
// With p_ij = exp(s_ij - max_i), l_i = sum_j p_ij and the score tangents ds = scale (dQ K^T + Q dK^T):
//   out_i  = (sum_j p_ij v_j) / l_i
//   dout_i = (sum_j p_ij ds_ij v_j + sum_j p_ij dv_j - shift_i out_i) / l_i   with shift_i = sum_j p_ij ds_ij
// so one pass over the keys gathers everything, and the softmax of a block is computed once for all k tangents.
//
// Floor: 2 products (L x S x D) for the primal and up to 4 for each tangent. All of them run through one register tile
// (csrc/cpu/simd), on panels of K^T and V that a thread keeps in first-level cache; the rows of Q, dQ_1 .. dQ_k of a
// query block are stacked, so a panel is loaded once for 1 + k products.
#include <limits>

#include "../arguments/attention.h"
#include "draw.h"

namespace frog {
namespace {

constexpr const char* kOp = "attention_jvp";
constexpr int64_t kKeys = 64;                // keys in a block
constexpr int64_t kMostRows = 48;            // query rows in a block
constexpr int64_t kBlockBytes = 512 * 1024;  // what a block of queries may take of the second-level cache

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
struct Simd;
template <>
struct Simd<float> {
  static int64_t vector() { return simd().vector_f32; }
  static int64_t panel() { return simd().panel_f32; }
  static constexpr auto tile = &SimdKernels::tile_f32;
  static constexpr auto attend = &SimdKernels::attend_f32;
  static constexpr auto rescale = &SimdKernels::rescale_f32;
};
template <>
struct Simd<double> {
  static int64_t vector() { return simd().vector_f64; }
  static int64_t panel() { return simd().panel_f64; }
  static constexpr auto tile = &SimdKernels::tile_f64;
  static constexpr auto attend = &SimdKernels::attend_f64;
  static constexpr auto rescale = &SimdKernels::rescale_f64;
};

// A matrix [depth, columns] cut into panels [depth, width] of neighbouring columns, each contiguous, the last one
// padded with zeros to whole vectors.
template <class T>
struct Panels {
  int64_t depth = 0, columns = 0, padded = 0;

  Panels(int64_t depth_, int64_t columns_)
      : depth(depth_), columns(columns_), padded(ceil_div(columns_, Simd<T>::vector()) * Simd<T>::vector()) {}
  int64_t size() const { return depth * padded; }
  int64_t width(int64_t column) const { return std::min(Simd<T>::panel(), padded - column); }
  // source(row, column) gives the elements
  template <class Source>
  void pack(T* out, const Source& source) const {
    for (int64_t c = 0; c < padded; c += Simd<T>::panel()) {
      const int64_t w = width(c);
      for (int64_t r = 0; r < depth; ++r) {
        for (int64_t j = 0; j < w; ++j) out[c * depth + r * w + j] = c + j < columns ? source(r, c + j) : T(0);
      }
    }
  }
  // acc [rows, acc_ld] += rows_of [rows, ld] times the matrix's rows `first .. first + count` (of the depth) at columns
  // `from .. to`; from a multiple of the panel width.
  void multiply(const T* packed, int64_t first, int64_t count, int64_t from, int64_t to, const T* rows_of, int64_t ld,
                int64_t rows, T* acc, int64_t acc_ld) const {
    for (int64_t c = from; c < to; c += Simd<T>::panel()) {
      const int64_t w = width(c);
      (simd().*Simd<T>::tile)(packed + c * depth + first * w, w, rows_of, ld, rows, count, acc + c - from, acc_ld,
                              false);
    }
  }
};

struct Mask {
  const Tensor* tensor = nullptr;
  std::array<int64_t, 4> strides{};  // over batch, head, query, key; 0 where broadcast
};

template <class T>
struct Problem {
  int64_t batch, heads, kv_heads, queries, keys, depth, width, k;
  const T *q, *dq, *key, *dkey, *v, *dv;  // [B, H, L, D], [k, B, H, L, D], [B, Hkv, S, D], [k, ..], [B, Hkv, S, Dv]
  T *out, *dout;                          // [B, H, L, Dv], [k, B, H, L, Dv]
  Mask mask;
  bool causal;
  T scale;
};

// scores [rows, ld] of one block += the mask; what must not be attended to becomes -inf.
template <class T, class M>
void add_mask(const M* mask, const int64_t* strides, T* scores, int64_t rows, int64_t count, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < count; ++j) {
      const M m = mask[r * strides[2] + j * strides[3]];
      if constexpr (std::is_same_v<M, bool>) {
        if (!m) scores[r * ld + j] = -std::numeric_limits<T>::infinity();
      } else {
        scores[r * ld + j] += static_cast<T>(m);
      }
    }
  }
}

template <class T>
void apply_mask(const Problem<T>& p, int64_t b, int64_t h, int64_t q0, int64_t rows, int64_t j0, int64_t count,
                T* scores, int64_t ld) {
  if (p.mask.tensor != nullptr) {
    const Tensor& t = *p.mask.tensor;
    const int64_t* strides = p.mask.strides.data();
    const int64_t at = b * strides[0] + h * strides[1] + q0 * strides[2] + j0 * strides[3];
    if (t.scalar_type() == ScalarType::Bool) {
      add_mask(static_cast<const bool*>(t.const_data_ptr()) + at, strides, scores, rows, count, ld);
    } else {
      dispatch_floating(kOp, t.scalar_type(), [&](auto zero) {
        using M = decltype(zero);
        add_mask(static_cast<const M*>(t.const_data_ptr()) + at, strides, scores, rows, count, ld);
      });
    }
  }
  if (p.causal) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = std::max<int64_t>(0, q0 + r + 1 - j0); j < count; ++j) {
        scores[r * ld + j] = -std::numeric_limits<T>::infinity();
      }
    }
  }
}

// K^T and V of every (batch, kv head), and their tangents, as panels.
template <class T>
struct Packed {
  Panels<T> kt, v;
  std::vector<T> kt_data, v_data;  // [1 + k or 1, B * Hkv, size]
  int64_t pairs;

  explicit Packed(const Problem<T>& p) : kt(p.depth, p.keys), v(p.keys, p.width), pairs(p.batch * p.kv_heads) {
    const int64_t kt_sets = p.dkey ? 1 + p.k : 1, v_sets = p.dv ? 1 + p.k : 1;
    kt_data.resize(kt_sets * pairs * kt.size());
    v_data.resize(v_sets * pairs * v.size());
    torch::stable::parallel_for(0, (kt_sets + v_sets) * pairs, 1, [&](int64_t from, int64_t to) {
      for (int64_t item = from; item < to; ++item) {
        const bool is_key = item < kt_sets * pairs;
        const int64_t at = is_key ? item : item - kt_sets * pairs;
        const int64_t set = at / pairs - 1, pair = at % pairs;
        if (is_key) {
          const T* rows = (set < 0 ? p.key : p.dkey + set * pairs * p.keys * p.depth) + pair * p.keys * p.depth;
          kt.pack(kt_data.data() + at * kt.size(), [&](int64_t r, int64_t c) { return rows[c * p.depth + r]; });
        } else {
          const T* rows = (set < 0 ? p.v : p.dv + set * pairs * p.keys * p.width) + pair * p.keys * p.width;
          v.pack(v_data.data() + at * v.size(), [&](int64_t r, int64_t c) { return rows[r * p.width + c]; });
        }
      }
    });
  }
  const T* kt_at(int64_t set, int64_t pair) const { return kt_data.data() + (set * pairs + pair) * kt.size(); }
  const T* v_at(int64_t set, int64_t pair) const { return v_data.data() + (set * pairs + pair) * v.size(); }
};

// What a thread needs for one block of queries, 1 + k groups of rows each.
template <class T>
struct Scratch {
  std::vector<T> q, scores, out, max, sum, shift, correction;
  Scratch(int64_t groups, int64_t rows, int64_t depth, int64_t width)
      : q(groups * rows * depth),
        scores(groups * rows * kKeys),
        out(groups * rows * width),
        max(rows),
        sum(rows),
        shift(groups * rows),
        correction(rows) {}
};

template <class T>
void attend_block(const Problem<T>& p, const Packed<T>& packed, Scratch<T>& s, int64_t head, int64_t q0, int64_t rows) {
  const int64_t b = head / p.heads, h = head % p.heads, k = p.k;
  const int64_t pair = b * p.kv_heads + h / (p.heads / p.kv_heads);
  const int64_t all = p.batch * p.heads * p.queries * p.depth, wide = packed.v.padded;
  const int64_t stacked = p.dq ? (1 + k) * rows : rows;
  for (int64_t g = 0; g < stacked / rows; ++g) {
    const T* from = (g == 0 ? p.q : p.dq + (g - 1) * all) + (head * p.queries + q0) * p.depth;
    for (int64_t j = 0; j < rows * p.depth; ++j) s.q[g * rows * p.depth + j] = p.scale * from[j];
  }
  std::fill(s.out.begin(), s.out.end(), T(0));
  std::fill(s.max.begin(), s.max.end(), -std::numeric_limits<T>::infinity());
  std::fill(s.sum.begin(), s.sum.end(), T(0));
  std::fill(s.shift.begin(), s.shift.end(), T(0));
  const bool moves = p.dq || p.dkey;  // otherwise only the values move and ds is zero
  const int64_t groups = moves ? 1 + k : 1;
  const int64_t last = p.causal ? std::min(p.keys, q0 + rows) : p.keys;
  T* scores = s.scores.data();
  for (int64_t j0 = 0; j0 < last; j0 += kKeys) {
    const int64_t count = std::min(kKeys, p.keys - j0);
    std::fill(scores, scores + groups * rows * kKeys, T(0));
    const int64_t to = std::min(packed.kt.padded, j0 + kKeys);
    packed.kt.multiply(packed.kt_at(0, pair), 0, p.depth, j0, to, s.q.data(), p.depth, stacked, scores, kKeys);
    for (int64_t i = 0; p.dkey && i < k; ++i) {
      packed.kt.multiply(packed.kt_at(1 + i, pair), 0, p.depth, j0, to, s.q.data(), p.depth, rows,
                         scores + (1 + i) * rows * kKeys, kKeys);
    }
    apply_mask(p, b, h, q0, rows, j0, count, scores, kKeys);
    (simd().*Simd<T>::attend)(scores, rows, moves ? k : 0, count, kKeys, s.max.data(), s.sum.data(), s.shift.data(),
                              s.correction.data());
    (simd().*Simd<T>::rescale)(s.out.data(), 1 + k, rows, wide, s.correction.data());
    packed.v.multiply(packed.v_at(0, pair), j0, count, 0, wide, scores, kKeys, groups * rows, s.out.data(), wide);
    for (int64_t i = 0; p.dv && i < k; ++i) {
      packed.v.multiply(packed.v_at(1 + i, pair), j0, count, 0, wide, scores, kKeys, rows,
                        s.out.data() + (1 + i) * rows * wide, wide);
    }
  }
  const int64_t each = p.batch * p.heads * p.queries * p.width;
  for (int64_t r = 0; r < rows; ++r) {
    const T inverse = s.sum[r] == T(0) ? T(0) : T(1) / s.sum[r];  // a row that attends to nothing: zeros
    const T* out = s.out.data() + r * wide;
    T* target = p.out + (head * p.queries + q0 + r) * p.width;
    for (int64_t j = 0; j < p.width; ++j) target[j] = out[j] * inverse;
    for (int64_t i = 0; i < k; ++i) {
      const T* moved = s.out.data() + ((1 + i) * rows + r) * wide;
      const T shift = s.shift[i * rows + r];
      T* tangent = p.dout + i * each + (head * p.queries + q0 + r) * p.width;
      for (int64_t j = 0; j < p.width; ++j) tangent[j] = (moved[j] - shift * target[j]) * inverse;
    }
  }
}

template <class T>
void run(const Problem<T>& p) {
  if (p.batch * p.heads * p.queries == 0) return;
  const Packed<T> packed(p);
  const int64_t row_bytes = (1 + p.k) * (p.depth + kKeys + packed.v.padded) * static_cast<int64_t>(sizeof(T));
  const int64_t rows = std::clamp<int64_t>(kBlockBytes / row_bytes / kTileRows * kTileRows, kTileRows, kMostRows);
  const int64_t blocks = ceil_div(p.queries, rows);
  torch::stable::parallel_for(0, p.batch * p.heads * blocks, 1, [&](int64_t from, int64_t to) {
    Scratch<T> scratch(1 + p.k, rows, p.depth, packed.v.padded);
    for (int64_t item = from; item < to; ++item) {
      const int64_t q0 = item % blocks * rows;
      attend_block(p, packed, scratch, item / blocks, q0, std::min(rows, p.queries - q0));
    }
  });
}

// Dense and in the compute type; `t` must be (*, rows, columns) with `lead` in front.
Tensor prepare(const Tensor& t, ScalarType compute) { return torch::stable::contiguous(to_dtype(t, compute)); }

std::optional<Tensor> prepare(const std::optional<Tensor>& t, ScalarType compute) {
  return t ? std::optional<Tensor>(prepare(*t, compute)) : std::nullopt;
}

Mask prepare_mask(const std::optional<Tensor>& mask) {
  Mask m;
  if (!mask) return m;
  m.tensor = &*mask;
  m.strides = attention_mask_strides(*mask);
  return m;
}

std::tuple<Tensor, Tensor> attention_jvp(const Tensor& query, const std::optional<Tensor>& dquery, const Tensor& key,
                                         const std::optional<Tensor>& dkey, const Tensor& value,
                                         const std::optional<Tensor>& dvalue, const std::optional<Tensor>& mask,
                                         bool is_causal, double scale) {
  const std::optional<Tensor>* const optional[4] = {&dquery, &dkey, &dvalue, &mask};
  const char* const names[4] = {"dquery", "dkey", "dvalue", "mask"};
  check_cpu(kOp, "query", query);
  check_cpu(kOp, "key", key);
  check_cpu(kOp, "value", value);
  for (int j = 0; j < 4; ++j) {
    if (*optional[j]) check_cpu(kOp, names[j], **optional[j]);
  }
  const int64_t k = check_attention(kOp, query, dquery, key, dkey, value, dvalue, mask, scale);

  const ScalarType compute = query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const std::optional<Tensor> dq = prepare(dquery, compute), dk = prepare(dkey, compute), dv = prepare(dvalue, compute);
  const Tensor q = prepare(query, compute), kk = prepare(key, compute), v = prepare(value, compute);
  const std::vector<int64_t> shape{query.size(0), query.size(1), query.size(2), value.size(3)};
  Tensor out = new_tensor(q, shape, compute);  // [B, H, L, Dv]
  Tensor dout = new_tensor(q, {k, shape[0], shape[1], shape[2], shape[3]}, compute);
  const Mask m = prepare_mask(mask);
  const auto go = [&](auto zero) {
    using T = decltype(zero);
    const auto data = [](const std::optional<Tensor>& t) {
      return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
    };
    run(Problem<T>{q.size(0), q.size(1), kk.size(1), q.size(2), kk.size(2), q.size(3), v.size(3), k, data(q), data(dq),
                   data(kk), data(dk), data(v), data(dv), static_cast<T*>(out.mutable_data_ptr()),
                   static_cast<T*>(dout.mutable_data_ptr()), m, is_causal, static_cast<T>(scale)});
  };
  if (compute == ScalarType::Double) {
    go(double{});
  } else {
    go(float{});
  }
  const Tensor& moved = dquery ? *dquery : dkey ? *dkey : *dvalue;
  return {to_dtype(out, query.scalar_type()), to_dtype(dout, moved.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CPU, m) { m.impl("attention_jvp", TORCH_BOX(&attention_jvp)); }

}  // namespace
}  // namespace frog
