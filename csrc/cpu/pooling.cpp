// max_pool_jvp: the largest element of every window, and of k tangents the elements at the same places.
//
// Floor: x and dx are read once, y and dy written once. Neighbouring planes go side by side, one in each lane of a
// vector: windows then are alike for all lanes, however short a line is. The places of a run of windows stay in cache,
// from where they are taken for all k tangents; as a tensor they exist only where they are asked for. A window's place
// is PyTorch's: the first of its largest elements, or its last NaN.
#include "../arguments/pooling.h"

#include "blocks.h"
#include "product.h"

namespace frog {
namespace {

constexpr const char* kOp = "max_pool_jvp";
constexpr int64_t kPositions = 4096;  // of a region of planes side by side, which stays in second-level cache
constexpr int32_t kNowhere = -1;      // the place of a window that lies in the padding

/// First position inside of a window that begins at `at`.
int64_t first_inside(const WindowAxis& a, int64_t at) {
  return at >= 0 ? at : at + (-at + a.dilation - 1) / a.dilation * a.dilation;
}

int64_t end_inside(const WindowAxis& a, int64_t at) { return std::min(a.size, at + a.kernel * a.dilation); }

// Where windows are in a plane, as far as all planes share it. A line is a row of windows.
struct Plan {
  const PoolSizes& sizes;
  bool some_nowhere = false;  // dilated windows may have no element inside

  explicit Plan(const PoolSizes& s) : sizes(s) {
    for (const WindowAxis& a : s.axes) {
      for (int64_t j = 0; j < a.count; ++j) some_nowhere |= first_inside(a, j * a.stride - a.padding) >= a.size;
    }
  }
  int64_t lines() const { return sizes.axes[0].count * sizes.axes[1].count; }
  int64_t front(int64_t line) const {
    return line / sizes.axes[1].count * sizes.axes[0].stride - sizes.axes[0].padding;
  }
  int64_t top(int64_t line) const { return line % sizes.axes[1].count * sizes.axes[1].stride - sizes.axes[1].padding; }
  /// Positions of a plane before which lines first .. first + count meet no element, and from which on they meet none.
  /// Of overlapping windows a later one may begin earlier: padding and dilation shift where they come inside.
  std::pair<int64_t, int64_t> region(int64_t first, int64_t count) const {
    const auto& [depth, height, width] = sizes.axes;
    int64_t begin = sizes.inputs(), end = 0;
    for (int64_t line = first; line < first + count; ++line) {
      const int64_t z0 = first_inside(depth, front(line)), z1 = end_inside(depth, front(line));
      const int64_t y0 = first_inside(height, top(line)), y1 = end_inside(height, top(line));
      if (z0 >= z1 || y0 >= y1) continue;
      begin = std::min(begin, (z0 * height.size + y0) * width.size);
      end = std::max(end, ((z1 - 1) * height.size + y1) * width.size);
    }
    return {std::min(begin, end), end};
  }
};

template <class C>
constexpr int64_t kLanes = kPoolBytes / sizeof(C);

inline void largest(const float* region, const Window& window, float* best, int32_t* places) {
  simd().largest_f32(region, window, best, places);
}
inline void largest(const double* region, const Window& window, double* best, int32_t* places) {
  simd().largest_f64(region, window, best, places);
}

/// The windows of a line: best and places [count, kLanes]. region [positions, kLanes]: what planes side by side hold
/// from position `begin` on.
template <class C>
void line_of_windows(const Plan& plan, const C* region, int64_t begin, int64_t line, C* best, int32_t* places) {
  const auto& [depth, height, width] = plan.sizes.axes;
  const int64_t front = plan.front(line), top = plan.top(line);
  const int64_t z = first_inside(depth, front), y = first_inside(height, top);
  const auto inside = [](const WindowAxis& a, int64_t first, int64_t at) {
    return std::max<int64_t>(0, ceil_div(end_inside(a, at) - first, a.dilation));
  };
  Window window{{inside(depth, z, front), inside(height, y, top), 0},
                {depth.dilation * height.size * width.size, height.dilation * width.size, width.dilation},
                0};
  for (int64_t j = 0; j < width.count; ++j) {
    const int64_t left = j * width.stride - width.padding, x = first_inside(width, left);
    window.counts[2] = inside(width, x, left);
    window.place = (z * height.size + y) * width.size + x;
    const bool some = window.counts[0] > 0 && window.counts[1] > 0 && window.counts[2] > 0;
    const C* elements = some ? region + (window.place - begin) * kLanes<C> : region;
    largest(elements, window, best + j * kLanes<C>, places + j * kLanes<C>);
  }
}

/// Marks the windows of a line that have no element inside.
void mark_nowhere(const Plan& plan, int64_t r, int32_t* places) {
  const auto& [depth, height, width] = plan.sizes.axes;
  const bool line =
      first_inside(depth, plan.front(r)) >= depth.size || first_inside(height, plan.top(r)) >= height.size;
  for (int64_t j = 0; j < width.count; ++j) {
    if (line || first_inside(width, j * width.stride - width.padding) >= width.size) places[j] = kNowhere;
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
  constexpr int64_t kWide = kLanes<C>;
  const Plan plan(s);
  const Source<C> x(x_);
  const Sink<C> y(y_);
  const int64_t k = dx.size(0), bytes = static_cast<int64_t>(dx.element_size());
  const auto each = bytes == 8 ? take<uint64_t> : bytes == 4 ? take<uint32_t> : take<uint16_t>;
  const char* from = static_cast<const char*>(dx.const_data_ptr());
  char* to = static_cast<char*>(dy.mutable_data_ptr());
  const int64_t inputs = s.inputs(), outputs = s.outputs(), lines = plan.lines(), width = s.axes[2].count;
  // Lines of windows are taken together, about as many as have their elements in a region of kPositions
  const auto [front, back] = plan.region(0, 1);
  const int64_t step = std::max<int64_t>(1, (inputs - (back - front)) / std::max<int64_t>(1, lines - 1));
  const int64_t together = std::clamp<int64_t>((kPositions - (back - front)) / step + 1, 1, lines);
  const int64_t blocks = ceil_div(lines, together), groups = ceil_div(s.planes, kWide);
  const int64_t grain = std::max<int64_t>(1, kWork / (together * width * (s.taps() + k) * kWide));
  torch::stable::parallel_for(0, groups * blocks, grain, [&](int64_t first_task, int64_t last_task) {
    const int64_t most = together * width;
    std::vector<C> scratch(y.direct() ? 0 : most);
    std::vector<int32_t> places(most);
    Scratch<C> best(most * kWide);
    Scratch<int32_t> found(most * kWide);
    for (int64_t task = first_task; task < last_task; ++task) {
      const int64_t first_plane = task / blocks * kWide, live = std::min(kWide, s.planes - first_plane);
      const int64_t first = task % blocks * together, count = std::min(together, lines - first);
      const auto [begin, end] = plan.region(first, count);
      const int64_t positions = end - begin;
      Scratch<C> region(positions * kWide), wide(x.direct() ? 0 : positions * kWide);
      const C* planes = x.direct() ? x.read(first_plane * inputs + begin, positions, nullptr) : wide.data();
      for (int64_t i = 0; !x.direct() && i < live; ++i) {
        x.read((first_plane + i) * inputs + begin, positions, wide.data() + i * positions);
      }
      pack(planes, x.direct() ? inputs : positions, live, positions, kWide, region.data());
      for (int64_t r = 0; r < count; ++r) {
        const int64_t at = r * width * kWide;
        line_of_windows(plan, region.data(), begin, first + r, best.data() + at, found.data() + at);
      }
      const int64_t n = count * width;
      for (int64_t i = 0; i < live; ++i) {
        const int64_t plane = first_plane + i, at = plane * outputs + first * width;
        C* result = y.place(at, scratch.data());
        for (int64_t j = 0; j < n; ++j) {
          result[j] = best.data()[j * kWide + i];
          places[j] = found.data()[j * kWide + i];
        }
        y.finish(at, n, result);
        if (indices) std::copy(places.begin(), places.begin() + n, indices + at);
        for (int64_t r = 0; plan.some_nowhere && r < count; ++r) mark_nowhere(plan, first + r, &places[r * width]);
        for (int64_t t = 0; t < k; ++t) {
          each(from + (t * s.planes + plane) * inputs * bytes, places.data(), n, plan.some_nowhere,
               to + (t * s.planes * outputs + at) * bytes);
        }
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
  const Tensor x = as_contiguous(x_), dx = as_contiguous(dx_);
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
