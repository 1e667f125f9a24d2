// All that a kernel file uses of CUDA itself. nvcc compiles kernel files for a GPU; g++ compiles the same text for the
// host, where tests/cuda_on_cpu supplies threads, barriers, shuffles, atomics and shared memory.
//
// What kernel files keep to, so that both are the same program:
//   - shared memory is dynamic, obtained through FROG_SHARED, its size computed beside the launch: at most
//     99 KiB, which every device since sm_80 has, or what shared_memory_of_device() tells;
//   - kernels are launched through frog::launch from plain functions that take pointers and a stream;
//   - no thread leaves before the last barrier of its block, and lanes of a warp meet in collectives or __syncwarp();
//   - inline PTX only in this file and mma.cuh, each behind one function with a host twin;
//   - only CUDA functions that the host header defines (it is a few lines to add one).
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

/// T* name: this block's dynamic shared memory, 16-byte aligned.
#define FROG_SHARED(T, name)                                           \
  extern __shared__ __align__(16) unsigned char frog_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(frog_dynamic_shared)

namespace frog {

inline void check_cuda(cudaError_t code, const char* what) {
  if (code != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(code));
}

/// kernel<<<grid, block, shared, stream>>>(args...), with its dynamic shared memory permitted and its launch checked.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
            Arguments&&... arguments) {
  if (shared > 48 * 1024) {  // more must be asked for, kernel by kernel
    const void* const which = reinterpret_cast<const void*>(kernel);
    check_cuda(cudaFuncSetAttribute(which, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
               "shared memory of a kernel");
    // All that a multiprocessor has, so that as many blocks fit as a kernel's launch bounds count on.
    check_cuda(
        cudaFuncSetAttribute(which, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "shared memory of a multiprocessor");
  }
  kernel<<<grid, block, shared, stream>>>(static_cast<Parameters>(std::forward<Arguments>(arguments))...);
  check_cuda(cudaGetLastError(), "launch of a kernel");
}

/// Blocks that fill the current device `per_multiprocessor` times over; for kernels that stride over their work.
inline int64_t blocks_of_device(int per_multiprocessor) {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "current device");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "number of multiprocessors");
  return int64_t{count} * per_multiprocessor;
}

/// Bytes of shared memory that one block may have on the current device.
inline int64_t shared_memory_of_device() {
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device), "current device");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
  return bytes;
}

/// Starts copying 16 bytes from global to shared memory, both 16-byte aligned; zeros where `inside` is false.
__device__ __forceinline__ void copy_async16(void* shared, const void* global, bool inside) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
/// 2^x with a relative error of about 2^-22, for results that are rounded to 16 bits; what is below float32's smallest
/// normal number becomes 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Closes a group of copies.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
/// Waits until at most `Left` of this thread's groups are under way; a barrier must follow before others read.
template <int Left>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Left) : "memory");
}

}  // namespace frog

#else
#include "cuda_on_cpu.h"
#endif

namespace frog {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;
constexpr int kWarp = 32;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace frog
