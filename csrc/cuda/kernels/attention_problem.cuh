// What the kernels of attention_jvp are given.
#pragma once

#include "types.cuh"

namespace frog {

/// A tensor [(k,) batch, heads, length, columns] with neighbouring columns side by side; the other strides in elements.
template <class T>
struct AttentionOperand {
  const T* data = nullptr;
  int64_t tangent = 0, batch = 0, head = 0, row = 0;
  bool packs = false;  // every row starts at a multiple of 16 bytes

  __device__ const T* at(int64_t i, int64_t b, int64_t h) const { return data + i * tangent + b * batch + h * head; }
};

enum class MaskType : int { kNone, kBool, kFloat64, kFloat32, kBfloat16, kFloat16 };

struct AttentionMask {
  const void* data = nullptr;
  MaskType type = MaskType::kNone;
  int64_t batch = 0, head = 0, row = 0, column = 0;  // strides; 0 where broadcast
};

/// T of the primal, D of the tangents.
template <class T, class D>
struct AttentionProblem {
  AttentionOperand<T> query, key, value;     // [B, H, L, depth], [B, Hkv, S, depth], [B, Hkv, S, width]
  AttentionOperand<D> dquery, dkey, dvalue;  // null where not perturbed
  AttentionMask mask;
  T* out;   // [B, H, L, width]
  D* dout;  // [k, B, H, L, width]
  int64_t batch, heads, kv_heads, queries, keys, depth, width, k;
  bool causal;
  double scale;
};

/// A score with the mask: -infinity where the key must not be attended to.
template <class S>
__device__ __forceinline__ S masked_score(S score, const AttentionMask& mask, int64_t offset) {
  switch (mask.type) {
    case MaskType::kNone:
      return score;
    case MaskType::kBool:
      return static_cast<const uint8_t*>(mask.data)[offset] ? score : -static_cast<S>(INFINITY);
    case MaskType::kFloat64:
      return score + static_cast<S>(static_cast<const double*>(mask.data)[offset]);
    case MaskType::kFloat32:
      return score + static_cast<const float*>(mask.data)[offset];
    case MaskType::kBfloat16:
      return score + widen(static_cast<const bf16*>(mask.data)[offset]);
    case MaskType::kFloat16:
      return score + widen(static_cast<const fp16*>(mask.data)[offset]);
  }
  return score;
}

template <class T>
AttentionOperand<T> with_packs(AttentionOperand<T> operand) {
  const int64_t strides[] = {operand.tangent, operand.batch, operand.head, operand.row};
  operand.packs = aligned16(operand.data);
  for (const int64_t stride : strides) operand.packs = operand.packs && stride % kPack<T> == 0;
  return operand;
}

/// Tangents of one block: all of them where there are enough blocks of queries, fewer where the device would be idle.
inline int64_t attention_group(int64_t blocks, int64_t k, int64_t chunk) {
  const int64_t chunks = ceil_div(k, chunk), wanted = ceil_div(blocks_of_device(2), blocks);
  const int64_t groups = wanted < chunks ? wanted : chunks;
  return ceil_div(chunks, groups) * chunk;
}

}  // namespace frog
