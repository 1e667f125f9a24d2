// What a draw needs of seed and step, spread out once per call: the ten round keys. In the instruction set's own
// namespace.
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

}  // namespace frog::FROG_ISA
