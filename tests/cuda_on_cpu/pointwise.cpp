#include "cuda/kernels/pointwise.cuh"

#include "exported.h"

using frog::bf16;
using frog::fp16;

#define POINTWISE(name, X, T)                                                                         \
  EXPORTED(pointwise_##name)                                                                          \
  (const X* x, const T* dx, const T* activity, X* y, T* dy, int64_t numel, int64_t period, int64_t k, \
   int64_t function, double alpha, double beta) {                                                     \
    frog::launch_pointwise(x, dx, activity, y, dy, numel, period, k, function, alpha, beta, nullptr); \
  }
FOR_EACH_PAIR_OF_TYPES(POINTWISE)
