#include "cuda/kernels/normalization.cuh"

#include "exported.h"

using frog::bf16;
using frog::fp16;

template <class X>
using C = typename frog::Compute<X>::type;

#define NORMALIZATION(name, X, T)                                                                                    \
  EXPORTED(normalization_##name)                                                                                     \
  (const X* x, const T* dx, const C<X>* weight, const C<X>* dweight, const C<X>* bias, const C<X>* dbias,            \
   const C<X>* given_mean, const C<X>* given_var, X* y, T* dy, C<X>* mean, C<X>* var, int64_t outer, int64_t groups, \
   int64_t inner, int64_t k, int64_t weight_groups, int64_t weight_inner, int64_t centred, double eps) {             \
    frog::launch_normalization(x, dx, weight, dweight, bias, dbias, given_mean, given_var, y, dy, mean, var, outer,  \
                               groups, inner, k, weight_groups, weight_inner, centred != 0, eps, nullptr);           \
  }
FOR_EACH_PAIR_OF_TYPES(NORMALIZATION)
