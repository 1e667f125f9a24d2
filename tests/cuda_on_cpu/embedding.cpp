#include "cuda/kernels/embedding.cuh"

#include "exported.h"

using frog::bf16;
using frog::fp16;

#define EMBEDDING(name, T)                                                                                      \
  EXPORTED(look_up_##name)                                                                                      \
  (const T* tables, const int64_t* indices, T* out, int64_t count, int64_t rows, int64_t dim, int64_t places) { \
    frog::launch_look_up(tables, indices, out, count, rows, dim, places, nullptr);                              \
  }                                                                                                             \
  EXPORTED(draw_rows_##name)                                                                                    \
  (const int64_t* state, const int64_t* indices, T* out, int64_t k, int64_t rows, int64_t dim, int64_t places,  \
   int64_t offset, int64_t first, int64_t distribution) {                                                       \
    frog::launch_draw_rows(state, indices, out, k, rows, dim, places, offset, first, distribution, nullptr);    \
  }
EMBEDDING(f64, double)
EMBEDDING(f32, float)
EMBEDDING(bf16, bf16)
EMBEDDING(fp16, fp16)
