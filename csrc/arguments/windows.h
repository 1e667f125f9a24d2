// What pooling and convolution have in common: windows that move along axes.
#pragma once

#include <cstdint>

namespace frog {

/// One axis that windows move along: window j covers j * stride - padding + i * dilation for i < kernel, where inside
/// [0, size).
struct WindowAxis {
  int64_t size = 1, kernel = 1, stride = 1, padding = 0, dilation = 1, count = 1;  // count: of windows

  /// Whether any window fits, and how many places there are to move one.
  int64_t room() const { return size + 2 * padding - dilation * (kernel - 1) - 1; }
};

}  // namespace frog
