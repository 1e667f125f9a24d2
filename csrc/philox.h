// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1,
// 2, 3" (SC 2011). Plain C++ shared by host and device code; checked against the known answers published with
// Random123.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FROG_HD __host__ __device__ __forceinline__
#else
#define FROG_HD inline
#endif

namespace frog {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;  // the golden ratio
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;  // sqrt(3) - 1
constexpr int kPhiloxRounds = 10;

struct PhiloxKey {
  uint32_t k0, k1;
};

struct PhiloxWords {
  uint32_t w[4];
};

FROG_HD PhiloxKey philox_key(uint64_t seed) { return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}; }

FROG_HD PhiloxWords philox4x32_10(PhiloxWords c, PhiloxKey key) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
#if defined(__CUDA_ARCH__)  // the same products; nvcc 13 adds an instruction to each if they are written as below
    const uint32_t low0 = kPhiloxM0 * c.w[0], high0 = __umulhi(kPhiloxM0, c.w[0]);
    const uint32_t low1 = kPhiloxM1 * c.w[2], high1 = __umulhi(kPhiloxM1, c.w[2]);
#else
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c.w[0];
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c.w[2];
    const uint32_t low0 = static_cast<uint32_t>(p0), high0 = static_cast<uint32_t>(p0 >> 32);
    const uint32_t low1 = static_cast<uint32_t>(p1), high1 = static_cast<uint32_t>(p1 >> 32);
#endif
    c = {{high1 ^ c.w[1] ^ key.k0, low1, high0 ^ c.w[3] ^ key.k1, low0}};
    key.k0 += kPhiloxW0;
    key.k1 += kPhiloxW1;
  }
  return c;
}

}  // namespace frog
