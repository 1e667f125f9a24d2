// What a draw needs of seed and step, spread out once per call: the ten round keys; and the words of a group. In the
// instruction set's own namespace.
#pragma once

namespace frog::FROG_ISA {

struct Schedule {
  uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
  uint32_t step;
  PhiloxKey key;

  Schedule(uint64_t seed, uint32_t step_)
      : step(step_), key{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)} {
    uint32_t a = key.k0, b = key.k1;
    for (int round = 0; round < kPhiloxRounds; ++round) {
      k0[round] = a;
      k1[round] = b;
      a += kPhiloxW0;
      b += kPhiloxW1;
    }
  }
};

// The words of the eight Philox calls of a group for one tangent: word w of call c at 16 (w / 2) + 2 c + w % 2, so that
// a Rademacher group is these 1024 bits in order.
struct GroupWords {
  alignas(64) uint32_t w[4 * kCallsPerGroup];
};

}  // namespace frog::FROG_ISA
