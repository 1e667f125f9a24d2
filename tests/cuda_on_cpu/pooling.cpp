#include "cuda/kernels/pooling.cuh"

#include "exported.h"

using frog::bf16;
using frog::fp16;

// geometry [3, 6]: size, kernel, stride, padding, dilation and count of each axis
#define POOLING(name, X, W)                                                                                      \
  EXPORTED(max_pool_##name)                                                                                      \
  (const X* x, const W* dx, X* y, W* dy, int64_t* indices, const int64_t* geometry, int64_t planes, int64_t k) { \
    frog::PoolShape shape{{}, planes};                                                                           \
    for (int j = 0; j < 3; ++j) {                                                                                \
      const int64_t* a = geometry + 6 * j;                                                                       \
      shape.axis[j] = {a[0], a[1], a[2], a[3], a[4], a[5]};                                                      \
    }                                                                                                            \
    frog::launch_max_pool(x, dx, y, dy, indices, shape, k, nullptr);                                             \
  }
POOLING(f64_8, double, uint64_t)
POOLING(f64_4, double, uint32_t)
POOLING(f32_8, float, uint64_t)
POOLING(f32_4, float, uint32_t)
POOLING(f32_2, float, uint16_t)
POOLING(bf16_4, bf16, uint32_t)
POOLING(bf16_2, bf16, uint16_t)
POOLING(fp16_2, fp16, uint16_t)
