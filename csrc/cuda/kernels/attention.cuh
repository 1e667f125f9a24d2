// Which kernel of attention_jvp takes which problem.
#pragma once

#include "attention_fma.cuh"

namespace frog {

template <class T, class D>
void launch_attention(AttentionProblem<T, D> p, cudaStream_t stream) {
  if (p.batch * p.heads * p.queries * p.width == 0) return;
  p.query = with_packs(p.query);
  p.key = with_packs(p.key);
  p.value = with_packs(p.value);
  p.dquery = with_packs(p.dquery);
  p.dkey = with_packs(p.dkey);
  p.dvalue = with_packs(p.dvalue);
  if constexpr (sizeof(typename Compute<T>::type) == 8) {
    launch_attention_as<32, 1, 64>(p, stream);
  } else if (p.width <= 64) {
    launch_attention_as<64, 2, 64>(p, stream);
  } else {
    launch_attention_as<64, 1, 128>(p, stream);
  }
}

}  // namespace frog
