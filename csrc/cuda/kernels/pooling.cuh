// max_pool_jvp: the largest element of every window, and of k tangents the elements at the same places.
//
// Floor: x and dx are read once, y and dy written once. A thread finds the place of one window, which stays in a
// register for the tangents of its part; neighbouring threads have neighbouring windows, so that what a warp reads of a
// tangent lies together. Where there are few windows, tangents are shared out over more blocks, each of which looks for
// the places again. A window's place is PyTorch's: the first of its largest elements, or its last NaN.
#pragma once

#include "types.cuh"

namespace frog {

constexpr int kPoolThreads = 256;
/// Tangents that a thread reads before it writes the first.
constexpr int kPoolTogether = 4;

/// One axis: window j covers j * stride - padding + i * dilation for i < kernel, where inside [0, size).
struct PoolWindow {
  int64_t size, kernel, stride, padding, dilation, count;

  __device__ __forceinline__ int64_t first(int64_t j) const {
    const int64_t at = j * stride - padding;
    return at >= 0 ? at : at + (-at + dilation - 1) / dilation * dilation;
  }
  __device__ __forceinline__ int64_t last(int64_t j) const {
    const int64_t end = j * stride - padding + kernel * dilation;
    return end < size ? end : size;
  }
};

struct PoolShape {
  PoolWindow axis[3];
  int64_t planes;
  __host__ __device__ int64_t inputs() const { return axis[0].size * axis[1].size * axis[2].size; }
  __host__ __device__ int64_t outputs() const { return axis[0].count * axis[1].count * axis[2].count; }
};

// x [planes, *size], dx [k, planes, *size]; y, indices (or null) [planes, *count], dy [k, planes, *count]. W: words of
// the tangents' size. Grid: x over windows, y over parts of the tangents.
template <class X, class W>
__global__ void __launch_bounds__(kPoolThreads)
    max_pool_kernel(const X* __restrict__ x, const W* __restrict__ dx, X* __restrict__ y, W* __restrict__ dy,
                    int64_t* __restrict__ indices, PoolShape shape, int64_t k, int64_t per_part) {
  using C = typename Compute<X>::type;
  const int64_t inputs = shape.inputs(), outputs = shape.outputs();
  const int64_t begin = blockIdx.y * per_part, end = begin + per_part < k ? begin + per_part : k;
  const PoolWindow depth = shape.axis[0], height = shape.axis[1], width = shape.axis[2];
  for (int64_t o = int64_t{blockIdx.x} * kPoolThreads + threadIdx.x; o < shape.planes * outputs;
       o += int64_t{gridDim.x} * kPoolThreads) {
    const int64_t plane = o / outputs, window = o % outputs, column = window % width.count;
    const int64_t line = window / width.count % height.count, sheet = window / width.count / height.count;
    const int64_t z0 = depth.first(sheet), z1 = depth.last(sheet), y0 = height.first(line), y1 = height.last(line);
    const int64_t x0 = width.first(column), x1 = width.last(column);
    const X* const from = x + plane * inputs;
    int64_t place = (z0 * height.size + y0) * width.size + x0;
    C best = -INFINITY;
    for (int64_t z = z0; z < z1; z += depth.dilation) {
      for (int64_t r = y0; r < y1; r += height.dilation) {
        for (int64_t c = x0; c < x1; c += width.dilation) {
          const int64_t at = (z * height.size + r) * width.size + c;
          const C value = widen(from[at]);
          if (value > best || value != value) {
            best = value;
            place = at;
          }
        }
      }
    }
    if (blockIdx.y == 0) {
      y[o] = narrow<X>(best);
      if (indices != nullptr) indices[o] = place;
    }
    const bool somewhere = z0 < z1 && y0 < y1 && x0 < x1;  // dilated windows may have no element inside
    for (int64_t i = begin; i < end; i += kPoolTogether) {
      W moved[kPoolTogether];
#pragma unroll
      for (int u = 0; u < kPoolTogether; ++u) {
        moved[u] = somewhere && i + u < end ? dx[((i + u) * shape.planes + plane) * inputs + place] : W(0);
      }
#pragma unroll
      for (int u = 0; u < kPoolTogether; ++u) {
        if (i + u < end) dy[(i + u) * shape.planes * outputs + o] = moved[u];
      }
    }
  }
}

template <class X, class W>
void launch_max_pool(const X* x, const W* dx, X* y, W* dy, int64_t* indices, const PoolShape& shape, int64_t k,
                     cudaStream_t stream) {
  const int64_t windows = shape.planes * shape.outputs();
  if (windows == 0) return;
  const int64_t blocks = ceil_div(windows, kPoolThreads), filling = ceil_div(blocks_of_device(8), blocks);
  int64_t parts = ceil_div(k, kPoolTogether);
  if (parts > filling) parts = filling;
  if (parts > 65535) parts = 65535;
  const int64_t per_part = ceil_div(k, parts);
  const dim3 grid(static_cast<unsigned>(blocks < 0x7FFFFFFF ? blocks : 0x7FFFFFFF),
                  static_cast<unsigned>(ceil_div(k, per_part)));
  launch(max_pool_kernel<X, W>, grid, dim3(kPoolThreads), 0, stream, x, dx, y, dy, indices, shape, k, per_part);
}

}  // namespace frog
