// Drawing tangents in registers: the words and elements of csrc/distributions.h, a call of Philox to a thread.
//
// Floors, in instructions that nvcc 13.0 makes for compute capability 9.0. A call of Philox is 60: 10 rounds of two
// 32 x 32 -> 64 bit products and two three-way XORs, and 18 additions to the key. A Box-Muller pair is 39. So a
// Rademacher element costs 60 / 128 = 0.5, and storing it is bound by memory; a normal element costs 60 / 8 + 39 / 2 =
// 27, as many as an H100 has time for, by its data sheet, while 3 bytes move.
#pragma once

#include "types.cuh"

namespace frog {

/// Philox's key and the step, as `state` [seed, step] on the device holds them now.
struct Stream {
  PhiloxKey key;
  uint32_t step;
  bool valid;  // a kernel cannot raise: results of a step outside [0, 2^32) are NaN
};

__device__ __forceinline__ Stream read_stream(const int64_t* __restrict__ state) {
  const int64_t step = state[1];
  return {philox_key(static_cast<uint64_t>(state[0])), static_cast<uint32_t>(step),
          step >= 0 && step < (int64_t{1} << 32)};
}

__device__ __forceinline__ PhiloxWords draw_words(const Stream& stream, int64_t tangent, uint64_t call) {
  return tangent_words(stream.key, stream.step, static_cast<uint32_t>(tangent), call);
}

// ---- normal: eight calls, 0 <= call < 8, give a group of 64 elements

/// Where in its group the elements of words 0 and 1 of a call start: four in a row; those of words 2 and 3 are 32
/// later.
__host__ __device__ __forceinline__ constexpr int normal_place(int call) { return 16 * (call & 1) + 4 * (call >> 1); }

/// The eight elements of a call: out[0..3] at normal_place(call), out[4..7] 32 later.
__device__ __forceinline__ void normal_elements(const PhiloxWords& words, float out[8]) {
#pragma unroll
  for (int w = 0; w < 4; ++w) normal_pair(words.w[w], out + 2 * w, out + 2 * w + 1);
}

/// The four elements of a multiple of four, in which `element` lies.
__device__ __forceinline__ void normal_quad(const Stream& stream, int64_t tangent, uint64_t element, float out[4]) {
  const uint32_t e = static_cast<uint32_t>(element % kNormalGroup);
  const uint64_t call = element / kNormalGroup * kCallsPerGroup + 2 * (e >> 2 & 3) + (e >> 4 & 1);
  const PhiloxWords words = draw_words(stream, tangent, call);
  const bool late = e >= 32;  // words are chosen, not indexed: registers have no address
  normal_pair(late ? words.w[2] : words.w[0], out, out + 1);
  normal_pair(late ? words.w[3] : words.w[1], out + 2, out + 3);
}

// ---- Rademacher: eight calls, 0 <= call < 8, give a group of 1024 elements, 32 runs of 32; bit b of a run's word is
// its element b

/// The run that a word of a call holds.
__host__ __device__ __forceinline__ constexpr int sign_run(int call, int word) {
  return 16 * (word >> 1) + 2 * call + (word & 1);
}

/// The word of the run in which `element` lies.
__device__ __forceinline__ uint32_t sign_word(const Stream& stream, int64_t tangent, uint64_t element) {
  const uint32_t e = static_cast<uint32_t>(element % kRademacherGroup);
  const PhiloxWords words = draw_words(stream, tangent, element / kRademacherGroup * kCallsPerGroup + (e >> 6 & 7));
  const uint32_t low = e >= 512 ? words.w[2] : words.w[0], high = e >= 512 ? words.w[3] : words.w[1];
  return e >> 5 & 1 ? high : low;
}

/// -1 where the bit (0 or 1) is set, else 1.
template <class T>
__device__ __forceinline__ T sign_element(uint32_t bit);
template <>
__device__ __forceinline__ float sign_element<float>(uint32_t bit) {
  return bits_float(0x3F800000u | (bit << 31));
}
template <>
__device__ __forceinline__ double sign_element<double>(uint32_t bit) {
  return bit ? -1.0 : 1.0;
}
template <>
__device__ __forceinline__ bf16 sign_element<bf16>(uint32_t bit) {
  return {static_cast<uint16_t>(0x3F80u | (bit << 15))};
}
template <>
__device__ __forceinline__ fp16 sign_element<fp16>(uint32_t bit) {
  return {static_cast<uint16_t>(0x3C00u | (bit << 15))};
}

/// c times the element whose sign is bit `place` of `word`.
__device__ __forceinline__ float signed_by(float c, uint32_t word, int place) {
  return bits_float(float_bits(c) ^ ((word << (31 - place)) & 0x80000000u));
}
__device__ __forceinline__ double signed_by(double c, uint32_t word, int place) {
  return (word >> place) & 1u ? -c : c;
}

/// The bits of a run's word whose elements, the first of which is `start`, lie in [begin, end).
__device__ __forceinline__ uint32_t run_mask(int64_t start, int64_t begin, int64_t end) {
  const int64_t low = begin > start ? begin - start : 0;
  const int64_t high = end - start < 32 ? end - start : 32;
  return low < high ? static_cast<uint32_t>((uint64_t{1} << high) - (uint64_t{1} << low)) : 0u;
}

}  // namespace frog
