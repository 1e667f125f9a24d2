#include "cuda/kernels/losses.cuh"

#include "exported.h"

using frog::bf16;
using frog::fp16;

#define LOSSES(name, X, T)                                                                                            \
  EXPORTED(cross_entropy_##name)                                                                                      \
  (const X* x, const T* dx, const int64_t* target, const frog::Compute<X>::type* weight, X* loss, T* dloss,           \
   int64_t rows, int64_t classes, int64_t k, int64_t ignore_index, double smoothing) {                                \
    frog::launch_cross_entropy(x, dx, target, weight, loss, dloss, rows, classes, k, ignore_index, smoothing,         \
                               nullptr);                                                                              \
  }                                                                                                                   \
  EXPORTED(reduce_losses_##name)                                                                                      \
  (const X* loss, const T* dloss, const int64_t* target, const frog::Compute<X>::type* weight, X* value,              \
   T* derivatives, int64_t rows, int64_t classes, int64_t k, int64_t ignore_index, int64_t mean) {                    \
    frog::launch_reduce_losses(loss, dloss, target, weight, value, derivatives, rows, classes, k, ignore_index,       \
                               mean != 0, nullptr);                                                                   \
  }                                                                                                                   \
  EXPORTED(mse_##name)                                                                                                \
  (const X* input, const X* target, const T* dinput, const T* dtarget, X* loss, T* dloss, int64_t numel, int64_t k) { \
    frog::launch_mse(input, target, dinput, dtarget, loss, dloss, numel, k, nullptr);                                 \
  }                                                                                                                   \
  EXPORTED(bce_##name)                                                                                                \
  (const X* input, const X* target, const X* weight, const X* pos_weight, const T* dinput, X* loss, T* dloss,         \
   int64_t numel, int64_t k, int64_t with_logits) {                                                                   \
    frog::launch_bce(input, target, weight, pos_weight, dinput, loss, dloss, numel, k, with_logits != 0, nullptr);    \
  }
FOR_EACH_PAIR_OF_TYPES(LOSSES)
