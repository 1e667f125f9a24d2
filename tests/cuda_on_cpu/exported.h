// How tests/cuda_on_cpu/<stem>.cpp hands launches to Python: pointers, then int64_t, then double arguments, in that
// order.
#pragma once

#include <cstdint>

#define EXPORTED(name) extern "C" __attribute__((visibility("default"))) void name

/// M(name, X, T) for the element types of primal and tangents that kernels exist for.
#define FOR_EACH_PAIR_OF_TYPES(M) \
  M(f64_f64, double, double)      \
  M(f32_f32, float, float)        \
  M(f32_bf16, float, bf16)        \
  M(f32_fp16, float, fp16)        \
  M(bf16_f32, bf16, float)        \
  M(bf16_bf16, bf16, bf16)        \
  M(fp16_f32, fp16, float)        \
  M(fp16_fp16, fp16, fp16)
