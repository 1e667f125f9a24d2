#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../../distributions.h"
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
  const SimdKernels* avx2 = nullptr;
  const SimdKernels* avx512 = nullptr;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) avx2 = avx2_kernels();
  if (avx2 != nullptr && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    avx512 = avx512_kernels();
  }
#endif
  const SimdKernels& best = avx512 != nullptr ? *avx512 : avx2 != nullptr ? *avx2 : baseline_kernels();
  const char* wanted = std::getenv("FROG_CUDA_SIMD");
  if (wanted == nullptr || *wanted == '\0') return best;
  if (std::strcmp(wanted, "baseline") == 0) return baseline_kernels();
  if (std::strcmp(wanted, "avx2") == 0 && avx2 != nullptr) return *avx2;
  if (std::strcmp(wanted, "avx512") == 0 && avx512 != nullptr) return *avx512;
  throw std::runtime_error(std::string("FROG_CUDA_SIMD is '") + wanted +
                           "'; this build on this machine accepts baseline" + (avx2 ? ", avx2" : "") +
                           (avx512 ? ", avx512" : ""));
}

}  // namespace

const SimdKernels& simd() {
  static const SimdKernels& chosen = choose();
  return chosen;
}

}  // namespace frog
