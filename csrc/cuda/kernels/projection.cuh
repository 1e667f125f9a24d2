// Pivoted Cholesky and its solves; csrc/cpu/projection.cpp says what is computed and why.
//
// One block per Gram matrix. The matrix lies in shared memory where it fits what the device has, with k <= 107 on any;
// a larger one is factorised in global memory. Cost is latency: 5 barriers a column, k <= 64 takes less time than
// drawing the tangents.
#pragma once

#include "platform.cuh"

namespace frog {

constexpr int kProjectionThreads = 256;
constexpr int kProjectionWarps = kProjectionThreads / kWarp;
/// Larger matrices than this are factorised in global memory on every device.
constexpr int64_t kSharedProjection = 128;
constexpr int64_t kMostProjected = 2048;
/// Right-hand sides of one block, from which on each thread solves one; fewer are solved by a warp each.
constexpr int64_t kManySides = kWarp;

/// Where a projection keeps what it works on.
struct ProjectionPlan {
  bool matrix_shared;  // the matrix in shared memory, not in global
  int solvers;         // warps that each solve for a right-hand side of their own in shared memory
  int64_t bytes;       // of shared memory
};

/// As much as fits `available` bytes of shared memory: scales and order, 12 bytes a tangent, and one solution always;
/// of the other solutions, 8 bytes a tangent each, as many as there is room for.
constexpr ProjectionPlan projection_plan(int64_t k, int64_t available) {
  const int64_t row = k * int64_t{sizeof(double)};
  const int64_t fixed = row + int64_t{sizeof(double)} + (k + 2 + 1) / 2 * 2 * int64_t{sizeof(int)};
  const int64_t whole = fixed + (kProjectionWarps + k) * row;
  if (k <= kSharedProjection && whole <= available) return {true, kProjectionWarps, whole};
  const int64_t room = (available - fixed) / row;
  const int solvers = static_cast<int>(room < kProjectionWarps ? room : kProjectionWarps);
  return {false, solvers, fixed + solvers * row};
}
static_assert(projection_plan(kMostProjected, 48 * 1024).solvers >= 1, "what any device permits");

// Lowest index of the largest value over the warp; `index` of every lane is different.
__device__ inline void warp_argmax(double& value, int& index) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(kFullWarp, value, step);
    const int other_index = __shfl_xor_sync(kFullWarp, index, step);
    if (other > value || (other == value && other_index < index)) {
      value = other;
      index = other_index;
    }
  }
}

// gram [b, k, k], derivatives [b, k, r] -> coefficients [b, k, r], rank [b]. A matrix with a negative, infinite or NaN
// entry where none may be gives NaN coefficients and rank -1: a kernel cannot raise. work [b, k, k], null where the
// matrix lies in shared memory. grid (b, parts of r).
__global__ void __launch_bounds__(kProjectionThreads)
    projection_kernel(const double* __restrict__ gram, const double* __restrict__ derivatives, double rtol,
                      double* __restrict__ work, double* __restrict__ coefficients, int64_t* __restrict__ ranks, int k,
                      int64_t r, int64_t sides, int solvers) {
  FROG_SHARED(double, shared);
  double* const scale = shared;                          // [k]
  double* const found = scale + k;                       // [1] the pivot before its root
  int* const order = reinterpret_cast<int*>(found + 1);  // [k]
  int* const best = order + k;                           // [1]
  int* const bad = best + 1;                             // [1]
  // [solvers, k], for few right-hand sides; 8-byte aligned whatever k is
  double* const solution = reinterpret_cast<double*>(order + (k + 2 + 1) / 2 * 2);
  double* const in_shared = solution + kProjectionWarps * k;
  const int t = static_cast<int>(threadIdx.x), threads = kProjectionThreads;
  const double* const g = gram + static_cast<int64_t>(blockIdx.x) * k * k;
  double* const a = work == nullptr ? in_shared : work + static_cast<int64_t>(blockIdx.x) * k * k;  // [k, k]

  if (t == 0) *bad = 0;
  __syncthreads();
  for (int i = t; i < k; i += threads) {
    const double diagonal = g[static_cast<int64_t>(i) * k + i];
    if (!(diagonal >= 0)) *bad = 1;
    scale[i] = diagonal > 0 ? 1.0 / sqrt(diagonal) : 0.0;
    order[i] = i;
  }
  __syncthreads();
  for (int e = t; e < k * k; e += threads) {
    if (!isfinite(g[e])) *bad = 1;
    a[e] = g[e] * scale[e / k] * scale[e % k];
  }
  __syncthreads();

  int rank = 0;
  for (; rank < k && !*bad; ++rank) {
    if (t < kWarp) {
      double value = -1.0;
      int index = k + t;
      for (int i = rank + t; i < k; i += kWarp) {
        if (a[static_cast<int64_t>(i) * k + i] > value) {
          value = a[static_cast<int64_t>(i) * k + i];
          index = i;
        }
      }
      warp_argmax(value, index);
      if (t == 0) {
        *found = value;
        *best = index;
      }
    }
    __syncthreads();
    if (!(*found > rtol)) break;  // the same for every thread
    const double pivot = sqrt(*found);
    const int from = *best;
    if (from != rank) {  // symmetric exchange
      for (int j = t; j < k; j += threads) {
        const double upper = a[static_cast<int64_t>(rank) * k + j];
        a[static_cast<int64_t>(rank) * k + j] = a[static_cast<int64_t>(from) * k + j];
        a[static_cast<int64_t>(from) * k + j] = upper;
      }
      __syncthreads();
      for (int j = t; j < k; j += threads) {
        const double left = a[static_cast<int64_t>(j) * k + rank];
        a[static_cast<int64_t>(j) * k + rank] = a[static_cast<int64_t>(j) * k + from];
        a[static_cast<int64_t>(j) * k + from] = left;
      }
      if (t == 0) {
        const int moved = order[rank];
        order[rank] = order[from];
        order[from] = moved;
      }
      __syncthreads();
    }
    for (int i = rank + t; i < k; i += threads) {
      const double l = i == rank ? pivot : a[static_cast<int64_t>(i) * k + rank] / pivot;
      a[static_cast<int64_t>(i) * k + rank] = l;
      a[static_cast<int64_t>(rank) * k + i] = l;  // the same column as a row, for neighbouring threads below
    }
    __syncthreads();
    const int rest = k - rank - 1;
    for (int e = t; e < rest * rest; e += threads) {
      const int i = rank + 1 + e / rest, j = rank + 1 + e % rest;
      a[static_cast<int64_t>(i) * k + j] -=
          a[static_cast<int64_t>(i) * k + rank] * a[static_cast<int64_t>(rank) * k + j];
    }
    __syncthreads();
  }
  __syncthreads();  // *found and *best are read by all before the block goes on

  const double* const d = derivatives + blockIdx.x * k * r;
  double* const c = coefficients + blockIdx.x * k * r;
  const int64_t first = blockIdx.y * sides, last = first + sides < r ? first + sides : r;
  const bool failed = *bad;
  if (t == 0 && blockIdx.y == 0) ranks[blockIdx.x] = failed ? -1 : rank;
  const double absent = failed ? static_cast<double>(NAN) : 0.0;
  for (int64_t e = t; e < (k - rank) * (last - first); e += threads) {  // dropped tangents; all of them if it failed
    c[order[rank + e / (last - first)] * r + first + e % (last - first)] = absent;
  }
  if (last - first >= kManySides) {
    for (int64_t s = first + t; s < last; s += threads) {  // L y = d, then L^T c = y, in place in c
      for (int i = 0; i < rank; ++i) {
        double y = d[order[i] * r + s] * scale[order[i]];
        for (int j = 0; j < i; ++j) y -= a[static_cast<int64_t>(i) * k + j] * c[order[j] * r + s];
        c[order[i] * r + s] = y / a[static_cast<int64_t>(i) * k + i];
      }
      for (int i = rank - 1; i >= 0; --i) {
        double y = c[order[i] * r + s];
        for (int j = i + 1; j < rank; ++j) y -= a[static_cast<int64_t>(j) * k + i] * c[order[j] * r + s];
        c[order[i] * r + s] = y / a[static_cast<int64_t>(i) * k + i];
      }
      for (int i = 0; i < rank; ++i) c[order[i] * r + s] *= scale[order[i]];
    }
    return;
  }
  const int lane = t % kWarp, warp = t / kWarp;
  if (warp >= solvers) return;
  double* const y = solution + warp * k;  // [rank]
  for (int64_t s = first + warp; s < last; s += solvers) {
    for (int i = lane; i < rank; i += kWarp) y[i] = d[order[i] * r + s] * scale[order[i]];
    __syncwarp();
    for (int j = 0; j < rank; ++j) {  // column by column: lanes share the update of what follows
      if (lane == 0) y[j] /= a[static_cast<int64_t>(j) * k + j];
      __syncwarp();
      for (int i = j + 1 + lane; i < rank; i += kWarp) y[i] -= a[static_cast<int64_t>(i) * k + j] * y[j];
      __syncwarp();
    }
    for (int j = rank - 1; j >= 0; --j) {
      if (lane == 0) y[j] /= a[static_cast<int64_t>(j) * k + j];
      __syncwarp();
      for (int i = lane; i < j; i += kWarp) y[i] -= a[static_cast<int64_t>(j) * k + i] * y[j];
      __syncwarp();
    }
    for (int i = lane; i < rank; i += kWarp) c[order[i] * r + s] = y[i] * scale[order[i]];
    __syncwarp();
  }
}

/// Right-hand sides of one block: all of them where each needs the only copy of a large matrix.
inline int64_t projection_sides(bool matrix_shared, int64_t r) {
  return !matrix_shared || r < kProjectionThreads ? r : kProjectionThreads;
}

inline void launch_projection(const ProjectionPlan& plan, const double* gram, const double* derivatives, double rtol,
                              double* work, double* coefficients, int64_t* rank, int64_t b, int64_t k, int64_t r,
                              cudaStream_t stream) {
  if (b == 0) return;
  const int64_t sides = r == 0 ? 1 : projection_sides(plan.matrix_shared, r);
  const int64_t parts = r == 0 ? 1 : ceil_div(r, sides);
  launch(projection_kernel, dim3(b, parts), dim3(kProjectionThreads), static_cast<size_t>(plan.bytes), stream, gram,
         derivatives, rtol, plan.matrix_shared ? nullptr : work, coefficients, rank, static_cast<int>(k), r, sides,
         plan.solvers);
}

}  // namespace frog
