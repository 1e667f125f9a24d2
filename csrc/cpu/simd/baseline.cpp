#include <cmath>
#include <cstdint>
#include <cstdlib>

#include "../../distributions.h"
#include "choice.h"
#include "kernels.h"

#define FROG_ISA baseline
#include "schedule.h"
//
#include "isa_baseline.h"
#include "lanes_baseline.h"
#include "elementary.h"
#include "math_impl.h"
#include "attention_impl.h"
#include "normalization_impl.h"
#include "pooling_impl.h"
#include "kernels_impl.h"

namespace frog {

const SimdKernels& baseline_kernels() { return baseline::kTable; }

namespace {

const SimdKernels& choose() {
  switch (choose_simd()) {
    case SimdLevel::kAvx512:
      return *avx512_kernels();
    case SimdLevel::kAvx2:
      return *avx2_kernels();
    default:
      return baseline_kernels();
  }
}

}  // namespace

const SimdKernels& simd() {
  static const SimdKernels& chosen = choose();
  return chosen;
}

namespace {

// Chosen when the library is loaded, so that no error can arise inside a parallel loop, where its text would be lost.
// frog_cuda/_load.py has refused a wrong FROG_CUDA_SIMD before; without it, the first kernel raises.
[[maybe_unused]] const bool chosen_at_load = [] {
  try {
    simd();
  } catch (const std::invalid_argument&) {
  }
  return true;
}();

}  // namespace

}  // namespace frog
