// Sums and maxima over the threads that share a row, in an order that depends on nothing but their number.
#pragma once

#include "platform.cuh"

namespace frog {

/// The threads of a block that share a row. Either `lanes` neighbours, a power of two: of one warp, or the whole block;
/// or `across` rows lie interleaved, a power of two up to kWarp: thread t works on row t % across, and the block is one
/// set.
class Group {
 public:
  static constexpr int kMostValues = 4;
  /// Bytes of shared memory that it needs for kMostValues values at a time.
  static size_t shared_bytes(int lanes, int across) {
    const int warps = lanes * across / kWarp;
    return warps <= 1 ? 0 : kMostValues * sizeof(double) * warps * across;
  }

  __device__ Group(int lanes, int across, double* shared)
      : lanes(lanes),
        across(across),
        row(static_cast<int>(across > 1 ? threadIdx.x % across : threadIdx.x / lanes)),
        lane(static_cast<int>(across > 1 ? threadIdx.x / across : threadIdx.x % lanes)),
        shared_(shared) {}

  const int lanes, across, row, lane;

  /// Every thread of the block calls it, and gets the sums over its row. double: sums of many terms, whatever they are.
  template <int N>
  __device__ __forceinline__ void sum(double (&v)[N]) const {
    reduce(v, [](double a, double b) { return a + b; });
  }
  /// NaN counts for nothing.
  template <class C>
  __device__ __forceinline__ C max(C value) const {
    double v[1] = {static_cast<double>(value)};
    reduce(v, [](double a, double b) { return fmax(a, b); });
    return static_cast<C>(v[0]);
  }

 private:
  template <int N, class Operation>
  __device__ __forceinline__ void reduce(double (&v)[N], const Operation& op) const {
    static_assert(N <= kMostValues);
    const int high = across == 1 && lanes < kWarp ? lanes : kWarp;
    for (int step = high / 2; step >= across; step /= 2) {  // both partners form the same sum: all get the same bits
#pragma unroll
      for (int n = 0; n < N; ++n) v[n] = op(v[n], __shfl_xor_sync(kFullWarp, v[n], step));
    }
    const int warps = lanes * across / kWarp;
    if (warps <= 1) return;
    const int t = static_cast<int>(threadIdx.x), warp = t / kWarp;
    __syncthreads();  // what was left here before has been read
    if (t % kWarp < across) {
#pragma unroll
      for (int n = 0; n < N; ++n) shared_[(n * warps + warp) * across + t % kWarp] = v[n];
    }
    __syncthreads();
    const int own = across > 1 ? row : 0;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      double total = shared_[n * warps * across + own];
      for (int w = 1; w < warps; ++w) total = op(total, shared_[(n * warps + w) * across + own]);
      v[n] = total;
    }
  }

  double* const shared_;
};

}  // namespace frog
