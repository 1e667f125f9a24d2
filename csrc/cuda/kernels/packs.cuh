// N elements of one thread, read 16 bytes at a time where they are neighbours, one by one where they are not.
#pragma once

#include "types.cuh"

namespace frog {

/// Elements that primal and tangents of these types read together: at least 16 bytes of each.
template <class X, class T>
constexpr int kElements = kPack<X> > kPack<T> ? kPack<X> : kPack<T>;

template <class T, int N>
struct Values {
  static constexpr int kPart = N < kPack<T> ? N : kPack<T>;
  Pack<T, kPart> part[N / kPart];
  __device__ __forceinline__ T& at(int j) { return part[j / kPart].at[j % kPart]; }
  __device__ __forceinline__ T at(int j) const { return part[j / kPart].at[j % kPart]; }
};

/// Element j of a thread is number first + j * step of `count`. kPacked: step is 1, all N lie inside or none does, and
/// the address of the first is a multiple of 16 bytes.
template <bool kPacked>
struct Slots {
  int64_t first, count;
  int step;
  __device__ __forceinline__ int64_t element(int j) const { return first + (kPacked ? j : int64_t{j} * step); }
  __device__ __forceinline__ bool holds(int j) const { return kPacked ? first < count : element(j) < count; }
};

template <class T>
__device__ __forceinline__ T zero_of() {
  return narrow<T>(0);
}

/// p[address(e)] for the elements e of the thread; 0 outside.
template <int N, bool kPacked, class T, class Address>
__device__ __forceinline__ Values<T, N> read(const T* __restrict__ p, const Slots<kPacked>& s, const Address& address) {
  Values<T, N> v;
  if constexpr (kPacked) {
    const bool inside = s.first < s.count;
    const Pack<T, kPack<T>>* from = reinterpret_cast<const Pack<T, kPack<T>>*>(p + (inside ? address(s.first) : 0));
#pragma unroll
    for (int c = 0; c < N / kPack<T>; ++c) {
      if (inside) {
        v.part[c] = from[c];
      } else {
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j) v.part[c].at[j] = zero_of<T>();
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) v.at(j) = s.holds(j) ? p[address(s.element(j))] : zero_of<T>();
  }
  return v;
}

template <int N, bool kPacked, class T, class Address>
__device__ __forceinline__ void write(T* __restrict__ p, const Slots<kPacked>& s, const Address& address,
                                      const Values<T, N>& v) {
  if constexpr (kPacked) {
    if (s.first >= s.count) return;
    Pack<T, kPack<T>>* to = reinterpret_cast<Pack<T, kPack<T>>*>(p + address(s.first));
#pragma unroll
    for (int c = 0; c < N / kPack<T>; ++c) to[c] = v.part[c];
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (s.holds(j)) p[address(s.element(j))] = v.at(j);
    }
  }
}

}  // namespace frog
