// attention_jvp: out = softmax(scale Q K^T + mask) V and its k tangents, blocked, with online softmax. T x T is never
// in memory: extra memory is that of K and V and their tangents (packed) of as many heads as keep the threads busy,
// plus a few hundred KiB for each thread. Short sequences are packed in cache, each head by the thread that needs it.
// Inputs are read as they are strided, so that queries, keys and values cut from one projection need no copy; results
// lie in memory as [B, L, H, Dv], which a layer that joins the heads again views as rows, and out and dout are
// neighbours where they have one dtype.
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
#include "blocks.h"
#include "product.h"

namespace frog {
namespace {

constexpr const char* kOp = "attention_jvp";
constexpr int64_t kKeys = 64;                // keys in a block; a multiple of every panel width
constexpr int64_t kMostKeys = 128;           // up to which all keys are one block
constexpr int64_t kMostRows = 48;            // query rows in a block
constexpr int64_t kBlockBytes = 512 * 1024;  // what a block of queries may take of the second-level cache
constexpr int64_t kPairBytes = 2 << 20;      // packed keys and values of a head that a thread may hold for itself
constexpr int64_t kFewestPairs = 8;          // heads that keep a few threads busy
constexpr int64_t kBlocksPerThread = 8;      // blocks of queries that share the threads evenly enough

template <class T>
struct Simd;
template <>
struct Simd<float> {
  static constexpr auto attend = &SimdKernels::attend_f32;
  static constexpr auto rescale = &SimdKernels::rescale_f32;
};
template <>
struct Simd<double> {
  static constexpr auto attend = &SimdKernels::attend_f64;
  static constexpr auto rescale = &SimdKernels::rescale_f64;
};

// A matrix [depth, columns] cut into panels [depth, width] of neighbouring columns, each contiguous, the last one
// padded with zeros to whole vectors.
template <class T>
struct Panels {
  int64_t depth = 0, columns = 0, padded = 0;

  Panels(int64_t depth_, int64_t columns_)
      : depth(depth_), columns(columns_), padded(ceil_div(columns_, vector_width<T>()) * vector_width<T>()) {}
  int64_t size() const { return depth * padded; }
  int64_t width(int64_t column) const { return std::min(panel_width<T>(), padded - column); }
  // Where a panel's columns come from: rows of a matrix [columns, depth] with row stride ld
  void pack_transposed(const T* from, int64_t ld, T* out) const {
    for (int64_t c = 0; c < padded; c += panel_width<T>()) {
      const int64_t w = width(c);
      pack(from + c * ld, ld, std::min(w, columns - c), depth, w, out + c * depth);
    }
  }
  // The matrix itself, [depth, columns] with row stride ld
  void pack_straight(const T* from, int64_t ld, T* out) const {
    for (int64_t c = 0; c < padded; c += panel_width<T>()) {
      const int64_t w = width(c), live = std::min(w, columns - c);
      for (int64_t r = 0; r < depth; ++r) {
        T* to = out + c * depth + r * w;
        std::copy(from + r * ld + c, from + r * ld + c + live, to);
        std::fill(to + live, to + w, T(0));
      }
    }
  }
  // acc [rows, acc_ld] += rows_of [rows, ld] times the matrix's rows `first .. first + count` (of the depth) at columns
  // `from .. to` (or = where `fresh`); from a multiple of the panel width.
  void multiply(const T* packed, int64_t first, int64_t count, int64_t from, int64_t to, const T* rows_of, int64_t ld,
                int64_t rows, T* acc, int64_t acc_ld, bool fresh) const {
    for (int64_t c = from; c < to; c += panel_width<T>()) {
      const int64_t w = width(c);
      tile(packed + c * depth + first * w, w, rows_of, ld, rows, count, acc + c - from, acc_ld, fresh);
    }
  }
};

struct Mask {
  const Tensor* tensor = nullptr;
  std::array<int64_t, 4> strides{};  // over batch, head, query, key; 0 where broadcast
};

// A tensor [k, B, H, L, D] (k: 1 for a primal) of T, or of bfloat16 where T is float, whose last axis is dense.
template <class T>
struct Heads {
  const void* data = nullptr;  // null where it was not given
  bool low = false;
  int64_t tangent = 0, batch = 0, head = 0, row = 0, width = 0;  // strides; elements of a row

  Heads() = default;
  explicit Heads(const std::optional<Tensor>& t) {
    if (!t) return;
    data = t->const_data_ptr(), low = t->scalar_type() == ScalarType::BFloat16;
    const int64_t d = t->dim();
    tangent = d == 5 ? t->stride(0) : 0;
    batch = t->stride(d - 4), head = t->stride(d - 3), row = t->stride(d - 2), width = t->size(d - 1);
  }
  explicit operator bool() const { return data != nullptr; }
  // Rows r .. r + n as T, *ld apart: in place, or widened into scratch [n, width].
  const T* rows(int64_t i, int64_t b, int64_t h, int64_t r, int64_t n, T* scratch, int64_t* ld) const {
    const int64_t at = i * tangent + b * batch + h * head + r * row;
    *ld = low ? width : row;
    if constexpr (std::is_same_v<T, float>) {
      const uint16_t* from = static_cast<const uint16_t*>(data) + at;
      for (int64_t j = 0; low && j < n; ++j) simd().widen_bf16(from + j * row, width, scratch + j * width);
    }
    return low ? scratch : static_cast<const T*>(data) + at;
  }
};

template <class T>
struct Problem {
  int64_t batch, heads, kv_heads, queries, keys, depth, width, k;
  Heads<T> q, dq, key, dkey, v, dv;  // [B, H, L, D], [k, B, H, L, D], [B, Hkv, S, D], [k, ..], [B, Hkv, S, Dv]
  T *out, *dout;                     // [B, L, H, Dv], [k, B, L, H, Dv]
  uint16_t* low_dout;                // dout in bfloat16, where that is null
  Mask mask;
  bool causal;
  T scale;

  int64_t block() const { return keys <= kMostKeys ? ceil_div(keys, vector_width<T>()) * vector_width<T>() : kKeys; }
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

// K^T and V and their tangents as panels, of one pair (batch, kv head) or of all.
template <class T>
struct Packed {
  Panels<T> kt, v;
  int64_t kt_sets, v_sets, pairs;
  Scratch<T> kt_data, v_data;  // [1 + k or 1, pairs, size]

  Packed(const Problem<T>& p, int64_t pairs_)
      : kt(p.depth, p.keys),
        v(p.keys, p.width),
        kt_sets(p.dkey ? 1 + p.k : 1),
        v_sets(p.dv ? 1 + p.k : 1),
        pairs(pairs_),
        kt_data(kt_sets * pairs * kt.size()),
        v_data(v_sets * pairs * v.size()) {}
  int64_t sets() const { return kt_sets + v_sets; }
  // packs set 0 .. sets() of the pair b, h into place `pair`
  void pack_set(const Problem<T>& p, int64_t b, int64_t h, int64_t set, int64_t pair) {
    const bool keys = set < kt_sets;
    const int64_t at = keys ? set : set - kt_sets;
    const Heads<T>& from = keys ? (at == 0 ? p.key : p.dkey) : at == 0 ? p.v : p.dv;
    Scratch<T> wide(from.low ? p.keys * from.width : 0);
    int64_t ld;
    const T* rows = from.rows(at - (at > 0), b, h, 0, p.keys, wide.data(), &ld);
    if (keys) {
      kt.pack_transposed(rows, ld, kt_data.data() + (at * pairs + pair) * kt.size());
    } else {
      v.pack_straight(rows, ld, v_data.data() + (at * pairs + pair) * v.size());
    }
  }
  const T* kt_at(int64_t set, int64_t pair) const { return kt_data.data() + (set * pairs + pair) * kt.size(); }
  const T* v_at(int64_t set, int64_t pair) const { return v_data.data() + (set * pairs + pair) * v.size(); }
};

// What a thread needs for one block of queries, 1 + k groups of rows each.
template <class T>
struct Workspace {
  Scratch<T> q, scores, out;
  std::vector<T> max, sum, shift, correction;
  Workspace(int64_t groups, int64_t rows, int64_t depth, int64_t keys, int64_t width)
      : q(groups * rows * depth),
        scores(groups * rows * keys),
        out(groups * rows * width),
        max(rows),
        sum(rows),
        shift(groups * rows),
        correction(rows) {}
};

// Queries q0 .. q0 + rows of head h of batch b, against the keys and values packed at place `pair`.
template <class T>
void attend_block(const Problem<T>& p, const Packed<T>& packed, int64_t pair, Workspace<T>& s, int64_t b, int64_t h,
                  int64_t q0, int64_t rows) {
  const int64_t k = p.k, wide = packed.v.padded, block = p.block();
  const int64_t stacked = p.dq ? (1 + k) * rows : rows;
  for (int64_t g = 0; g < stacked / rows; ++g) {
    T* to = s.q.data() + g * rows * p.depth;
    int64_t ld;
    const T* from = (g == 0 ? p.q : p.dq).rows(g - (g > 0), b, h, q0, rows, to, &ld);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < p.depth; ++j) to[r * p.depth + j] = p.scale * from[r * ld + j];
    }
  }
  std::fill(s.max.begin(), s.max.end(), -std::numeric_limits<T>::infinity());
  std::fill(s.sum.begin(), s.sum.end(), T(0));
  std::fill(s.shift.begin(), s.shift.end(), T(0));
  const bool moves = p.dq || p.dkey;  // otherwise only the values move and ds is zero
  const int64_t groups = moves ? 1 + k : 1;
  const int64_t last = p.causal ? std::min(p.keys, q0 + rows) : p.keys;
  T *scores = s.scores.data(), *out = s.out.data();
  if (last == 0) std::fill(out, out + (1 + k) * rows * wide, T(0));
  for (int64_t j0 = 0; j0 < last; j0 += block) {
    const bool first = j0 == 0;
    const int64_t count = std::min(block, last - j0);
    const int64_t to = std::min(packed.kt.padded, j0 + count);
    packed.kt.multiply(packed.kt_at(0, pair), 0, p.depth, j0, to, s.q.data(), p.depth, stacked, scores, block, true);
    for (int64_t i = 0; p.dkey && i < k; ++i) {
      packed.kt.multiply(packed.kt_at(1 + i, pair), 0, p.depth, j0, to, s.q.data(), p.depth, rows,
                         scores + (1 + i) * rows * block, block, !p.dq);
    }
    apply_mask(p, b, h, q0, rows, j0, count, scores, block);
    (simd().*Simd<T>::attend)(scores, rows, moves ? k : 0, count, block, s.max.data(), s.sum.data(), s.shift.data(),
                              s.correction.data());
    if (!first) (simd().*Simd<T>::rescale)(out, 1 + k, rows, wide, s.correction.data());
    packed.v.multiply(packed.v_at(0, pair), j0, count, 0, wide, scores, block, groups * rows, out, wide, first);
    for (int64_t i = 0; p.dv && i < k; ++i) {
      packed.v.multiply(packed.v_at(1 + i, pair), j0, count, 0, wide, scores, block, rows, out + (1 + i) * rows * wide,
                        wide, first && !moves);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const T inverse = s.sum[r] == T(0) ? T(0) : T(1) / s.sum[r];  // a row that attends to nothing: zeros
    const int64_t each = p.batch * p.heads * p.queries * p.width;
    const T* value = out + r * wide;
    const int64_t at = ((b * p.queries + q0 + r) * p.heads + h) * p.width;
    T* target = p.out + at;
    for (int64_t j = 0; j < p.width; ++j) target[j] = value[j] * inverse;
    for (int64_t i = 0; i < k; ++i) {
      T* moved = out + ((1 + i) * rows + r) * wide;
      const T shift = s.shift[i * rows + r];
      T* tangent = p.low_dout ? moved : p.dout + i * each + at;
      for (int64_t j = 0; j < p.width; ++j) tangent[j] = (moved[j] - shift * target[j]) * inverse;
      if constexpr (std::is_same_v<T, float>) {
        if (p.low_dout) simd().narrow_bf16(tangent, p.width, p.low_dout + i * each + at);
      }
    }
  }
}

template <class T>
void run(const Problem<T>& p) {
  if (p.batch * p.heads * p.queries == 0) return;
  const int64_t pairs = p.batch * p.kv_heads, shared = p.heads / p.kv_heads;
  const Panels<T> kt(p.depth, p.keys), v(p.keys, p.width);
  const int64_t row_bytes = (1 + p.k) * (p.depth + p.block() + v.padded) * static_cast<int64_t>(sizeof(T));
  const int64_t rows = std::clamp<int64_t>(kBlockBytes / row_bytes / kTileRows * kTileRows, kTileRows, kMostRows);
  const int64_t blocks = ceil_div(p.queries, rows);
  const int64_t pair_bytes = (1 + p.k) * (kt.size() + v.size()) * static_cast<int64_t>(sizeof(T));
  const int64_t threads = torch::stable::get_num_threads();
  if (pairs >= std::max(kFewestPairs, threads) && pair_bytes <= kPairBytes) {
    torch::stable::parallel_for(0, pairs, 1, [&](int64_t from, int64_t to) {
      Packed<T> packed(p, 1);
      Workspace<T> workspace(1 + p.k, rows, p.depth, p.block(), v.padded);
      for (int64_t pair = from; pair < to; ++pair) {
        const int64_t b = pair / p.kv_heads, h = pair % p.kv_heads;
        for (int64_t set = 0; set < packed.sets(); ++set) packed.pack_set(p, b, h, set, 0);
        for (int64_t item = 0; item < shared * blocks; ++item) {
          const int64_t q0 = item % blocks * rows;
          attend_block(p, packed, 0, workspace, b, h * shared + item / blocks, q0, std::min(rows, p.queries - q0));
        }
      }
    });
    return;
  }
  // Heads packed at a time: one, or as many as give the threads enough to do.
  const int64_t most = std::min(pairs, ceil_div(kBlocksPerThread * threads, shared * blocks));
  Packed<T> packed(p, most);
  for (int64_t begin = 0; begin < pairs; begin += most) {
    const int64_t count = std::min(most, pairs - begin);
    torch::stable::parallel_for(0, packed.sets() * count, 1, [&](int64_t from, int64_t to) {
      for (int64_t item = from; item < to; ++item) {
        const int64_t pair = begin + item % count;
        packed.pack_set(p, pair / p.kv_heads, pair % p.kv_heads, item / count, item % count);
      }
    });
    torch::stable::parallel_for(0, count * shared * blocks, 1, [&](int64_t from, int64_t to) {
      Workspace<T> workspace(1 + p.k, rows, p.depth, p.block(), v.padded);
      for (int64_t item = from; item < to; ++item) {
        const int64_t at = item / (shared * blocks), pair = begin + at, q0 = item % blocks * rows;
        const int64_t h = pair % p.kv_heads * shared + item / blocks % shared;
        attend_block(p, packed, at, workspace, pair / p.kv_heads, h, q0, std::min(rows, p.queries - q0));
      }
    });
  }
}

// In the compute type, or bfloat16 as it is where that is float; its last axis dense.
Tensor prepare(const Tensor& t, ScalarType compute) {
  const Tensor converted = reads_low(t.scalar_type(), compute) ? t : to_dtype(t, compute);
  return converted.stride(converted.dim() - 1) == 1 ? converted : as_contiguous(converted);
}

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
  const std::vector<int64_t> shape{query.size(0), query.size(2), query.size(1), value.size(3)};  // [B, L, H, Dv]
  const ScalarType moved = (dquery ? *dquery : dkey ? *dkey : *dvalue).scalar_type();
  const bool low = reads_low(moved, compute);
  auto [out, dout] = new_dual(q, shape, k, compute, low ? moved : compute);
  const Mask m = prepare_mask(mask);
  const auto go = [&, &out = out, &dout = dout](auto zero) {
    using T = decltype(zero);
    void* tangents = dout.mutable_data_ptr();
    run(Problem<T>{q.size(0),
                   q.size(1),
                   kk.size(1),
                   q.size(2),
                   kk.size(2),
                   q.size(3),
                   v.size(3),
                   k,
                   Heads<T>(q),
                   Heads<T>(dq),
                   Heads<T>(kk),
                   Heads<T>(dk),
                   Heads<T>(v),
                   Heads<T>(dv),
                   static_cast<T*>(out.mutable_data_ptr()),
                   low ? nullptr : static_cast<T*>(tangents),
                   low ? static_cast<uint16_t*>(tangents) : nullptr,
                   m,
                   is_causal,
                   static_cast<T>(scale)});
  };
  if (compute == ScalarType::Double) {
    go(double{});
  } else {
    go(float{});
  }
  return {to_dtype(torch::stable::transpose(out, 1, 2), query.scalar_type()),
          to_dtype(torch::stable::transpose(dout, 2, 3), moved)};
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CPU, m) { m.impl("attention_jvp", TORCH_BOX(&attention_jvp)); }

}  // namespace
}  // namespace frog
