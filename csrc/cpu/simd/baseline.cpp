#include <cstdint>
#include <cstdlib>

#include "../../distributions.h"
#include "choice.h"
#include "kernels.h"

#define FROG_ISA baseline
#include "schedule.h"
//
#include "isa_baseline.h"
#include "attention_impl.h"
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

}  // namespace frog
