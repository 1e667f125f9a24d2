#include "cuda/kernels/attention.cuh"

#include "exported.h"

namespace {

// Strides of tensors that lie densely, or with their heads inside their rows: (k, B, L, H, D).
template <class T>
frog::AttentionOperand<T> operand(const T* data, int64_t batch, int64_t heads, int64_t rows, int64_t columns,
                                  bool interleaved) {
  const int64_t each = rows * heads * columns;
  return {data, batch * each, each, interleaved ? columns : rows * columns, interleaved ? heads * columns : columns};
}

template <class T, class D>
void attention(const T* q, const D* dq, const T* key, const D* dkey, const T* v, const D* dv, const void* mask, T* out,
               D* dout, const int64_t* mask_strides, int64_t mask_type, int64_t batch, int64_t heads, int64_t kv_heads,
               int64_t queries, int64_t keys, int64_t depth, int64_t width, int64_t k, int64_t causal,
               int64_t interleaved, double scale) {
  frog::AttentionProblem<T, D> p{};
  p.query = operand(q, batch, heads, queries, depth, interleaved);
  p.dquery = operand(dq, batch, heads, queries, depth, interleaved);
  p.key = operand(key, batch, kv_heads, keys, depth, interleaved);
  p.dkey = operand(dkey, batch, kv_heads, keys, depth, interleaved);
  p.value = operand(v, batch, kv_heads, keys, width, interleaved);
  p.dvalue = operand(dv, batch, kv_heads, keys, width, interleaved);
  p.mask = {mask,           static_cast<frog::MaskType>(mask_type), mask_strides[0], mask_strides[1], mask_strides[2],
            mask_strides[3]};
  p.out = out;
  p.dout = dout;
  p.batch = batch;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.queries = queries;
  p.keys = keys;
  p.depth = depth;
  p.width = width;
  p.k = k;
  p.causal = causal;
  p.scale = scale;
  frog::launch_attention(p, nullptr);
}

}  // namespace

#define ATTENTION(name, T, D)                                                                                     \
  EXPORTED(name)(const T* q, const D* dq, const T* key, const D* dkey, const T* v, const D* dv, const void* mask, \
                 const int64_t* mask_strides, T* out, D* dout, int64_t mask_type, int64_t batch, int64_t heads,   \
                 int64_t kv_heads, int64_t queries, int64_t keys, int64_t depth, int64_t width, int64_t k,        \
                 int64_t causal, int64_t interleaved, double scale) {                                             \
    attention<T, D>(q, dq, key, dkey, v, dv, mask, out, dout, mask_strides, mask_type, batch, heads, kv_heads,    \
                    queries, keys, depth, width, k, causal, interleaved, scale);                                  \
  }
ATTENTION(attention_float64, double, double)
ATTENTION(attention_float32, float, float)
ATTENTION(attention_float32_bfloat16, float, frog::bf16)
ATTENTION(attention_bfloat16, frog::bf16, frog::bf16)
ATTENTION(attention_float16, frog::fp16, frog::fp16)
