// max_pool_jvp: the largest element of every window, and of k tangents the elements at the same places.
//
// Floor: x and dx are read once, y and dy written once. The places of a run of windows stay in cache, from where they
// are taken for all k tangents; as a tensor they exist only where they are asked for. A window's place is PyTorch's:
// the first of its largest elements, or its last NaN.
#include "../arguments/pooling.h"

#include <limits>

#include "blocks.h"

namespace frog {
namespace {

constexpr const char* kOp = "max_pool_jvp";
constexpr int64_t kWindows = 4096;  // whose places are held at a time, in first-level cache
constexpr int32_t kNowhere = -1;    // the place of a window that lies in the padding

/// First position inside of a window that begins at `at`.
int64_t first_inside(const PoolAxis& a, int64_t at) {
  return at >= 0 ? at : at + (-at + a.dilation - 1) / a.dilation * a.dilation;
}

/// Windows low .. high of an axis whose element i lies inside.
struct Reach {
  int64_t low, high;
  Reach(const PoolAxis& a, int64_t i) {
    const int64_t at = i * a.dilation - a.padding;  // in window 0
    low = at >= 0 ? 0 : (-at + a.stride - 1) / a.stride;
    high = at >= a.size ? 0 : std::min(a.count, (a.size - 1 - at) / a.stride + 1);
  }
};

// Where windows are in a plane, as far as all planes share it.
struct Plan {
  const PoolSizes& sizes;
  std::vector<int32_t> starts;  // [count] of the last axis: first position inside
  std::vector<Reach> reach;     // [kernel] of the last axis
  bool some_nowhere = false;    // dilated windows may have no element inside

  explicit Plan(const PoolSizes& s) : sizes(s) {
    const PoolAxis& last = s.axes[2];
    for (int64_t j = 0; j < last.count; ++j) {
      starts.push_back(static_cast<int32_t>(first_inside(last, j * last.stride - last.padding)));
    }
    for (int64_t i = 0; i < last.kernel; ++i) reach.emplace_back(last, i);
    for (const PoolAxis& a : s.axes) {
      for (int64_t j = 0; j < a.count; ++j) some_nowhere |= first_inside(a, j * a.stride - a.padding) >= a.size;
    }
  }
  int64_t lines() const { return sizes.axes[0].count * sizes.axes[1].count; }
};

/// The elements that windows low .. high have at `at` + j * step of a row, compared with the best so far. kStep: step
/// where it is known beforehand, else 0.
template <int kStep, class C>
void compare(const C* __restrict row, int64_t at, int64_t step_, int32_t place, int64_t low, int64_t high,
             C* __restrict best, int32_t* __restrict places) {
  const int64_t step = kStep > 0 ? kStep : step_;
  for (int64_t j = low; j < high; ++j) {
    const C value = row[at + j * step], before = best[j];
    const bool taken = value > before || value != value;
    best[j] = taken ? value : before;
    places[j] = taken ? place + static_cast<int32_t>(j * step) : places[j];
  }
}

/// best and places [count] of a line of windows, number r of a plane's lines. row [size]: scratch.
template <class C>
void line_of_windows(const Plan& plan, const Source<C>& x, int64_t plane, int64_t r, C* row, C* best, int32_t* places) {
  const auto& [depth, height, width] = plan.sizes.axes;
  const int64_t front = r / height.count * depth.stride - depth.padding;
  const int64_t top = r % height.count * height.stride - height.padding;
  const int64_t z0 = first_inside(depth, front), z1 = std::min(depth.size, front + depth.kernel * depth.dilation);
  const int64_t y0 = first_inside(height, top), y1 = std::min(height.size, top + height.kernel * height.dilation);
  for (int64_t j = 0; j < width.count; ++j) {
    best[j] = -std::numeric_limits<C>::infinity();
    places[j] = static_cast<int32_t>((z0 * height.size + y0) * width.size) + plan.starts[j];
  }
  const auto each = width.stride == 1 ? compare<1, C> : width.stride == 2 ? compare<2, C> : compare<0, C>;
  for (int64_t z = z0; z < z1; z += depth.dilation) {
    for (int64_t y = y0; y < y1; y += height.dilation) {
      const int64_t at = (z * height.size + y) * width.size;
      const C* elements = x.read(plane * plan.sizes.inputs() + at, width.size, row);
      for (int64_t i = 0; i < width.kernel; ++i) {
        const int64_t shift = i * width.dilation - width.padding;
        each(elements, shift, width.stride, static_cast<int32_t>(at + shift), plan.reach[i].low, plan.reach[i].high,
             best, places);
      }
    }
  }
}

/// Marks the windows of a line that have no element inside.
void mark_nowhere(const Plan& plan, int64_t r, int32_t* places) {
  const auto& [depth, height, width] = plan.sizes.axes;
  const bool line = first_inside(depth, r / height.count * depth.stride - depth.padding) >= depth.size ||
                    first_inside(height, r % height.count * height.stride - height.padding) >= height.size;
  for (int64_t j = 0; j < width.count; ++j) {
    if (line || plan.starts[j] >= width.size) places[j] = kNowhere;
  }
}

// to [n] = from[places], words of type W; zeros where there is no place
template <class W>
void take(const char* from, const int32_t* places, int64_t n, bool some_nowhere, char* to) {
  const W* source = reinterpret_cast<const W*>(from);
  W* target = reinterpret_cast<W*>(to);
  if (some_nowhere) {
    for (int64_t j = 0; j < n; ++j) target[j] = places[j] == kNowhere ? W(0) : source[places[j]];
  } else {
    for (int64_t j = 0; j < n; ++j) target[j] = source[places[j]];
  }
}

// x [planes, *size], dx [k, planes, *size], indices [planes, *count] or null
template <class C>
void run(const PoolSizes& s, const Tensor& x_, const Tensor& dx, Tensor& y_, Tensor& dy, int64_t* indices) {
  const Plan plan(s);
  const Source<C> x(x_);
  const Sink<C> y(y_);
  const int64_t k = dx.size(0), bytes = static_cast<int64_t>(dx.element_size());
  const auto each = bytes == 8 ? take<uint64_t> : bytes == 4 ? take<uint32_t> : take<uint16_t>;
  const char* from = static_cast<const char*>(dx.const_data_ptr());
  char* to = static_cast<char*>(dy.mutable_data_ptr());
  const PoolAxis& width = s.axes[2];
  const int64_t inputs = s.inputs(), outputs = s.outputs(), lines = plan.lines();
  const int64_t together = std::clamp<int64_t>(kWindows / width.count, 1, lines),
                blocks = (lines + together - 1) / together;
  const int64_t elements = s.axes[0].kernel * s.axes[1].kernel * width.kernel;  // of a window
  const int64_t grain = std::max<int64_t>(1, kWork / (together * width.count * (elements + k)));
  torch::stable::parallel_for(0, s.planes * blocks, grain, [&](int64_t begin, int64_t end) {
    std::vector<C> row(x.direct() ? 0 : width.size), scratch(y.direct() ? 0 : together * width.count);
    std::vector<int32_t> places(together * width.count);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t plane = b / blocks, first = b % blocks * together, count = std::min(together, lines - first);
      const int64_t n = count * width.count, at = plane * outputs + first * width.count;
      C* best = y.place(at, scratch.data());
      for (int64_t r = 0; r < count; ++r) {
        line_of_windows(plan, x, plane, first + r, row.data(), best + r * width.count, &places[r * width.count]);
      }
      y.finish(at, n, best);
      if (indices) std::copy(places.begin(), places.begin() + n, indices + at);
      for (int64_t r = 0; plan.some_nowhere && r < count; ++r) mark_nowhere(plan, first + r, &places[r * width.count]);
      for (int64_t i = 0; i < k; ++i) {
        each(from + (i * s.planes + plane) * inputs * bytes, places.data(), n, plan.some_nowhere,
             to + (i * s.planes * outputs + at) * bytes);
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> max_pool_jvp(const Tensor& x_, const Tensor& dx_, std::vector<int64_t> kernel,
                                                std::vector<int64_t> stride, std::vector<int64_t> padding,
                                                std::vector<int64_t> dilation, bool ceil_mode, bool want_indices) {
  check_cpu(kOp, "x", x_);
  check_cpu(kOp, "dx", dx_);
  const PoolSizes s = check_max_pool(kOp, x_, dx_, kernel, stride, padding, dilation, ceil_mode);
  const Tensor x = torch::stable::contiguous(x_), dx = torch::stable::contiguous(dx_);
  auto [y, dy] = new_dual(x, s.y_shape, dx.size(0), x.scalar_type(), dx.scalar_type());
  Tensor indices = new_tensor(x, want_indices ? s.y_shape : std::vector<int64_t>{0}, ScalarType::Long);
  int64_t* places = want_indices ? static_cast<int64_t*>(indices.mutable_data_ptr()) : nullptr;
  if (x.scalar_type() == ScalarType::Double) {
    run<double>(s, x, dx, y, dy, places);
  } else {
    run<float>(s, x, dx, y, dy, places);
  }
  return {y, dy, indices};
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CPU, m) { m.impl("max_pool_jvp", TORCH_BOX(&max_pool_jvp)); }

}  // namespace
}  // namespace frog
