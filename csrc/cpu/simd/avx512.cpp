#include <cmath>
#include <cstdint>
#include <cstdlib>

#include "../../distributions.h"
#include "kernels.h"

#if defined(FROG_X86_KERNELS)
#include <immintrin.h>
// GCC 12 warns about the deliberately undefined operand inside its own intrinsics once they are inlined (GCC bug
// 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
// After every shared header: what follows may use AVX-512 and is in a namespace of its own.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,popcnt,prefer-vector-width=512")
#define FROG_ISA avx512
#include "schedule.h"
//
#include "isa_avx512.h"
#include "lanes_avx512.h"
#include "elementary.h"
#include "math_impl.h"
#include "attention_impl.h"
#include "normalization_impl.h"
#include "pooling_impl.h"
#include "bf16_avx512.h"
#include "kernels_impl.h"

namespace frog {
const SimdKernels* avx512_kernels() { return &avx512::kTable; }
}  // namespace frog
#else
namespace frog {
const SimdKernels* avx512_kernels() { return nullptr; }
}  // namespace frog
#endif
