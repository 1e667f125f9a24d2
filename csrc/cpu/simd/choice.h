// Which table of vector kernels runs here. Shared by the operators and by build_info; avx2.cpp and avx512.cpp must not
// include it (kernels.h says why).
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(FROG_X86_KERNELS)
#include <cpuid.h>
#endif

namespace frog {

enum class SimdLevel { kBaseline, kAvx2, kAvx512 };

inline const char* simd_name(SimdLevel level) {
  return level == SimdLevel::kAvx512 ? "avx512" : level == SimdLevel::kAvx2 ? "avx2" : "baseline";
}

// The best level that this build contains and this machine can run.
inline SimdLevel best_simd() {
#if defined(FROG_X86_KERNELS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) return avx512 ? SimdLevel::kAvx512 : SimdLevel::kAvx2;
#endif
  return SimdLevel::kBaseline;
}

// The best level, or the lower one that the environment variable FROG_CUDA_SIMD names.
inline SimdLevel choose_simd() {
  const SimdLevel best = best_simd();
  const char* wanted = std::getenv("FROG_CUDA_SIMD");
  if (wanted == nullptr || *wanted == '\0') return best;
  std::string accepted;
  for (SimdLevel level : {SimdLevel::kBaseline, SimdLevel::kAvx2, SimdLevel::kAvx512}) {
    if (level > best) break;
    if (std::strcmp(wanted, simd_name(level)) == 0) return level;
    accepted += std::string(accepted.empty() ? "" : ", ") + simd_name(level);
  }
  throw std::invalid_argument(std::string("FROG_CUDA_SIMD is '") + wanted + "'; this build on this machine accepts " +
                              accepted);
}

// What multiplies bfloat16 matrices in less time than float32 ones take (measured, docs/performance.md).
enum class Bf16Products { kNothing, kTile, kLibrary };

// On AMD it is AVX-512 BF16, and the tile has it. Intel's does no more multiplications a cycle than float32 has and
// takes 1.8 times as long; there it is AMX, which the library has. Without either the library takes up to five times as
// long.
inline Bf16Products bf16_products() {
#if defined(FROG_X86_KERNELS)
  static const Bf16Products found = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512bf16") || choose_simd() != SimdLevel::kAvx512) return Bf16Products::kNothing;
    constexpr unsigned kAmxBf16 = 1u << 22;  // of edx; not every compiler that builds this knows its name
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kAmxBf16)) return Bf16Products::kLibrary;
    if (!__builtin_cpu_is("amd")) return Bf16Products::kNothing;
    return avx512_kernels()->tile_bf16 ? Bf16Products::kTile : Bf16Products::kLibrary;
  }();
  return found;
#else
  return Bf16Products::kNothing;
#endif
}

}  // namespace frog
