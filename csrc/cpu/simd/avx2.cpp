#include <cmath>
#include <cstdint>
#include <cstdlib>

#include "../../distributions.h"
#include "kernels.h"

#if defined(FROG_X86_KERNELS)
#include <immintrin.h>
// After every shared header: what follows may use AVX2 and is in a namespace of its own.
#pragma GCC target("avx2,fma,popcnt,f16c")
#define FROG_ISA avx2
#include "schedule.h"
//
#include "isa_avx2.h"
#include "lanes_avx2.h"
#include "elementary.h"
#include "math_impl.h"
#include "attention_impl.h"
#include "normalization_impl.h"
#include "pooling_impl.h"
#include "kernels_impl.h"

namespace frog {
const SimdKernels* avx2_kernels() { return &avx2::kTable; }
}  // namespace frog
#else
namespace frog {
const SimdKernels* avx2_kernels() { return nullptr; }
}  // namespace frog
#endif
