#include "cuda/kernels/softmax.cuh"

#include "exported.h"

using frog::bf16;
using frog::fp16;

#define SOFTMAX(name, X, T)                                                                                 \
  EXPORTED(softmax_##name)                                                                                  \
  (const X* x, const T* dx, X* y, T* dy, int64_t outer, int64_t n, int64_t inner, int64_t k, int64_t log) { \
    frog::launch_softmax(x, dx, y, dy, outer, n, inner, k, log != 0, nullptr);                              \
  }
FOR_EACH_PAIR_OF_TYPES(SOFTMAX)
