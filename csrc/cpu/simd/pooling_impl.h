// Max pooling of planes side by side, one in each lane.
//
// Included by baseline.cpp, avx2.cpp and avx512.cpp after the vector types.
#pragma once

namespace frog::FROG_ISA {

// A place as an element, so that values and places are chosen by the same masks: in the bits of a float, which has too
// few digits, and as the value of a double.
inline float place_as(float, int64_t place) { return bits_float(static_cast<uint32_t>(place)); }
inline double place_as(double, int64_t place) { return static_cast<double>(place); }
inline int32_t place_of(float element) { return static_cast<int32_t>(float_bits(element)); }
inline int32_t place_of(double element) { return static_cast<int32_t>(element); }

// A value is taken where it is larger than those before it, or a NaN.
template <class T>
void largest(const T* region, const Window& w, T* best, int32_t* places) {
  using V = typename VectorOf<T>::type;
  constexpr int kLanes = kPoolBytes / sizeof(T), kVectors = kLanes / V::kWidth;
  V values[kVectors], found[kVectors];
  for (int n = 0; n < kVectors; ++n) {
    values[n] = V::set(-static_cast<T>(__builtin_inf()));
    found[n] = V::set(place_as(T(), w.place));
  }
  for (int64_t z = 0; z < w.counts[0]; ++z) {
    for (int64_t y = 0; y < w.counts[1]; ++y) {
      for (int64_t x = 0; x < w.counts[2]; ++x) {
        const int64_t shift = z * w.steps[0] + y * w.steps[1] + x * w.steps[2];
        const V here = V::set(place_as(T(), w.place + shift));
        for (int n = 0; n < kVectors; ++n) {
          const V v = V::load(region + shift * kLanes + n * V::kWidth);
          const auto larger = values[n] < v, number = v <= v;
          values[n] = select(number, select(larger, v, values[n]), v);
          found[n] = select(number, select(larger, here, found[n]), here);
        }
      }
    }
  }
  T words[kLanes];
  for (int n = 0; n < kVectors; ++n) {
    values[n].store(best + n * V::kWidth);
    found[n].store(words + n * V::kWidth);
  }
  for (int i = 0; i < kLanes; ++i) places[i] = place_of(words[i]);
}

}  // namespace frog::FROG_ISA
