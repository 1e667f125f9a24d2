// Runs CUDA kernels on the host, for tests: one fiber per thread of a block, blocks one after another.
//
// Threads that can run do so in an order that a seed shuffles, so that a missing barrier shows as a wrong result.
// Shared memory is allocated to the byte and filled with NaN before each block, so that AddressSanitizer sees overruns
// and results see what was never written. A barrier that not all threads reach, a collective that not all of its lanes
// reach, or lanes that meet in different ones, end the program with a message that names the lines.
#pragma once

#include <math.h>  // unlike <cmath>, it overloads the global exp, sqrt, ... for float, as CUDA does

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using uint3 = dim3;
using cudaStream_t = void*;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace cuda_on_cpu {

constexpr int kLanes = 32;
constexpr int kSlotBytes = 64;

/// What the running thread sees.
struct Thread {
  uint3 thread_index, block_index;
  dim3 block_size, grid_size;
};
extern Thread* current;

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void* shared_memory();
/// Bytes that a block may have; a launch that asks for more ends the program. 99 KiB, as on the smallest devices, or
/// what the environment variable CUDA_ON_CPU_SHARED says.
size_t shared_memory_of_device();
void block_barrier(int line);
/// Leaves `bytes` of `value` for the other lanes of `mask` and waits for theirs: returns 32 slots of kSlotBytes.
const unsigned char* exchange(uint32_t mask, const void* value, size_t bytes, const char* what, int line);
void run(const std::function<void()>& body, dim3 grid, dim3 block, size_t shared);
unsigned lane();

// Copies that are under way until waited for.
void copy_begin(void* to, const void* from, bool inside);
void copy_commit();
void copy_wait(int left);

template <class T>
T from_lane(const unsigned char* slots, int lane) {
  T value;
  std::memcpy(&value, slots + lane * kSlotBytes, sizeof(T));
  return value;
}

template <class T>
T shuffle(uint32_t mask, T value, int width, const char* what, int line,
          const std::function<int(int, int, int)>& choose) {
  static_assert(sizeof(T) <= kSlotBytes);
  const unsigned char* slots = exchange(mask, &value, sizeof(T), what, line);
  const int own = static_cast<int>(lane()), first = own / width * width;
  const int source = choose(own, first, first + width);
  if (source < first || source >= first + width) return value;
  if (!(mask >> source & 1u)) fail("%s in line %d reads lane %d, which is not in mask %08x", what, line, source, mask);
  return from_lane<T>(slots, source);
}

}  // namespace cuda_on_cpu

#define threadIdx (::cuda_on_cpu::current->thread_index)
#define blockIdx (::cuda_on_cpu::current->block_index)
#define blockDim (::cuda_on_cpu::current->block_size)
#define gridDim (::cuda_on_cpu::current->grid_size)

#define FROG_SHARED(T, name) T* const name = reinterpret_cast<T*>(::cuda_on_cpu::shared_memory())

inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_cpu::block_barrier(line); }
inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu, int line = __builtin_LINE()) {
  cuda_on_cpu::exchange(mask, nullptr, 0, "__syncwarp", line);
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  return cuda_on_cpu::shuffle(mask, value, width, "__shfl_sync", line,
                              [=](int, int first, int) { return first + (source & (width - 1)); });
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, int line = __builtin_LINE()) {
  return cuda_on_cpu::shuffle(mask, value, width, "__shfl_xor_sync", line,
                              [=](int own, int, int) { return own ^ bits; });
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  return cuda_on_cpu::shuffle(mask, value, width, "__shfl_down_sync", line,
                              [=](int own, int, int) { return own + static_cast<int>(delta); });
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  return cuda_on_cpu::shuffle(mask, value, width, "__shfl_up_sync", line,
                              [=](int own, int, int) { return own - static_cast<int>(delta); });
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, int line = __builtin_LINE()) {
  const unsigned char* slots = cuda_on_cpu::exchange(mask, &predicate, sizeof(int), "__ballot_sync", line);
  uint32_t votes = 0;
  for (int l = 0; l < 32; ++l) {
    if (mask >> l & 1u) votes |= static_cast<uint32_t>(cuda_on_cpu::from_lane<int>(slots, l) != 0) << l;
  }
  return votes;
}
inline int __any_sync(uint32_t mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) == mask;
}

// Threads switch at barriers and collectives only, so plain read-modify-write is atomic here.
template <class T>
T atomicAdd(T* address, T value) {
  return std::exchange(*address, *address + value);
}
template <class T>
T atomicMax(T* address, T value) {
  return std::exchange(*address, std::max(*address, value));
}
template <class T>
T atomicMin(T* address, T value) {
  return std::exchange(*address, std::min(*address, value));
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __ldg(const T* address) {
  return *address;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline double normcdf(double x) { return 0.5 * std::erfc(x * -0.70710678118654752440); }
inline float normcdf(float x) { return static_cast<float>(normcdf(static_cast<double>(x))); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
using std::max;
using std::min;

namespace frog {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t,
            Arguments&&... arguments) {
  cuda_on_cpu::run([&] { kernel(static_cast<Parameters>(arguments)...); }, grid, block, shared);
}

/// Few, so that every kernel that strides over its work has to.
inline int64_t blocks_of_device(int per_multiprocessor) { return per_multiprocessor; }

inline int64_t shared_memory_of_device() { return static_cast<int64_t>(cuda_on_cpu::shared_memory_of_device()); }

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < FLT_MIN ? 0.0f : y;
}

inline void copy_async16(void* shared, const void* global, bool inside) {
  cuda_on_cpu::copy_begin(shared, global, inside);
}
inline void copy_async_commit() { cuda_on_cpu::copy_commit(); }
template <int Left>
void copy_async_wait() {
  cuda_on_cpu::copy_wait(Left);
}

}  // namespace frog
