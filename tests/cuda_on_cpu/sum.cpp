#include "cuda/kernels/sum.cuh"

#include "exported.h"

using frog::bf16;
using frog::fp16;

#define SUM(name, T)                                                                                            \
  EXPORTED(sum_##name)                                                                                          \
  (const T* a, const T* va, const T* b, const T* vb, T* out, int64_t numel, int64_t a_period, int64_t b_period, \
   int64_t k, double alpha) {                                                                                   \
    frog::launch_sum(a, va, a_period, b, vb, b_period, alpha, out, numel, k, nullptr);                          \
  }
SUM(f64, double)
SUM(f32, float)
SUM(bf16, bf16)
SUM(fp16, fp16)
