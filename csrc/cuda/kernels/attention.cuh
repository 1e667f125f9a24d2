// Which kernel of attention_jvp takes which problem: 16-bit floats go to tensor cores; float32 does not, since TF32
// would miss the bound of 1e-5, nor does a 16-bit tangent of a float32 primal, whose P must be as exact.
#pragma once

#include "attention_fma.cuh"
#include "attention_mma.cuh"

namespace frog {

/// 16-bit floats: depth up to kMostMmaDepth.
template <class T, class D>
void launch_attention(AttentionProblem<T, D> p, cudaStream_t stream) {
  if (p.batch * p.heads * p.queries * p.width == 0) return;
  p.query = with_packs(p.query);
  p.key = with_packs(p.key);
  p.value = with_packs(p.value);
  p.dquery = with_packs(p.dquery);
  p.dkey = with_packs(p.dkey);
  p.dvalue = with_packs(p.dvalue);
  if constexpr (sizeof(T) == 2) {
    if (p.depth <= 128 && p.width <= 64) {
      launch_attention_mma<64, 64>(p, stream);
    } else {
      launch_attention_mma<32, 128>(p, stream);
    }
  } else if constexpr (sizeof(T) == 8) {
    launch_attention_as<32, 1, 64>(p, stream);
  } else if (p.width <= 64) {
    launch_attention_as<64, 2, 64>(p, stream);
  } else {
    launch_attention_as<64, 1, 128>(p, stream);
  }
}

}  // namespace frog
