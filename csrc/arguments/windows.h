// What pooling and convolution have in common: windows that move along axes.
#pragma once

#include <array>
#include <cstdint>

namespace frog {

/// One axis that windows move along: window j covers j * stride - padding + i * dilation for i < kernel, where inside
/// [0, size).
struct WindowAxis {
  int64_t size = 1, kernel = 1, stride = 1, padding = 0, dilation = 1, count = 1;  // count: of windows

  /// Where element i of window j lies; it may be beside the axis.
  int64_t at(int64_t j, int64_t i) const { return j * stride - padding + i * dilation; }
  /// Steps of one element that a window can take; negative where none fits.
  int64_t room() const { return size + 2 * padding - dilation * (kernel - 1) - 1; }
};

/// Three axes, of which the first may be missing and then have size 1.
struct WindowAxes {
  std::array<WindowAxis, 3> axes;

  int64_t inputs() const { return axes[0].size * axes[1].size * axes[2].size; }
  int64_t outputs() const { return axes[0].count * axes[1].count * axes[2].count; }
  int64_t taps() const { return axes[0].kernel * axes[1].kernel * axes[2].kernel; }  // elements of a window
};

}  // namespace frog
