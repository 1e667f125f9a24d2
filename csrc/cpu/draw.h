// What every operator that draws tangents on the CPU shares: reading `state`, cutting a range where groups end, low
// precision.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "../arguments/tangents.h"
#include "pool.h"
#include "simd/kernels.h"

namespace frog {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

/// Checks the arguments that say which tangents are meant. `state` must outlive the result.
inline DrawSpec draw_spec(const char* op, const Tensor& state, int64_t k, int64_t first, int64_t distribution) {
  simd();  // chosen before any parallel loop: from inside one, the message about a wrong choice would be lost
  check_cpu(op, "state", state);
  check_draw(op, state, k, first, distribution);
  const int64_t* values = static_cast<const int64_t*>(state.const_data_ptr());
  if (distribution == kStandardBasis) {
    for (int64_t i = first; i < first + k; ++i) {
      STD_TORCH_CHECK(values[i] >= 0, op, ": coordinate ", i, " is ", values[i], "; it must not be negative");
    }
    return {distribution, 0, 0, first, values};
  }
  STD_TORCH_CHECK(values[1] >= 0 && values[1] < (int64_t{1} << 32), op, ": step is ", values[1],
                  "; it must lie in [0, 2^32)");
  return {distribution, static_cast<uint64_t>(values[0]), static_cast<uint32_t>(values[1]), first, nullptr};
}

/// Calls body(start, count) for the pieces of [offset, offset + numel) between multiples of kDrawChunk, in parallel.
template <class Body>
void for_each_chunk(int64_t offset, int64_t numel, int64_t k, const Body& body) {
  if (numel == 0) return;
  const int64_t end = offset + numel;
  const int64_t grain = std::max<int64_t>(1, 4 / k);
  torch::stable::parallel_for(offset / kDrawChunk, (end + kDrawChunk - 1) / kDrawChunk, grain,
                              [&](int64_t a, int64_t b) {
                                for (int64_t chunk = a; chunk < b; ++chunk) {
                                  const int64_t start = std::max(offset, chunk * kDrawChunk);
                                  body(start, std::min(end, (chunk + 1) * kDrawChunk) - start);
                                }
                              });
}

/// Calls body(T{}) with the element type of `type`, one of the four floating types.
template <class Body>
void dispatch_floating(const char* op, ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    case ScalarType::Half:
      return body(Half{});
    default:
      STD_TORCH_CHECK(false, op, ": dtype ", dtype_string(type),
                      " is not supported; accepted are float32, float64, bfloat16 and float16");
  }
}

/// float for every low-precision type, else the type itself.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};

// The table's entries by element type.
inline void draw(const DrawSpec& s, int64_t k, int64_t start, int64_t count, float* out, int64_t ld) {
  simd().draw_f32(s, k, start, count, out, ld);
}
inline void draw(const DrawSpec& s, int64_t k, int64_t start, int64_t count, double* out, int64_t ld) {
  simd().draw_f64(s, k, start, count, out, ld);
}
inline void combine(const DrawSpec& s, int64_t k, const float* c, int64_t start, int64_t count, float* out) {
  simd().combine_f32(s, k, c, start, count, out);
}
inline void combine(const DrawSpec& s, int64_t k, const double* c, int64_t start, int64_t count, double* out) {
  simd().combine_f64(s, k, c, start, count, out);
}
inline void gram(const float* v, int64_t k, int64_t n, int64_t ld, double* out) { simd().gram_f32(v, k, n, ld, out); }
inline void gram(const double* v, int64_t k, int64_t n, int64_t ld, double* out) { simd().gram_f64(v, k, n, ld, out); }

inline void gram_of_signs(const DrawSpec& s, int64_t k, int64_t start, int64_t count, double* out) {
  std::vector<uint64_t> scratch(k * kSignWords);
  simd().gram_of_signs(s, k, start, count, scratch.data(), out);
}

/// Adds up the partial Gram matrices in order and mirrors the lower triangle: partials [parts, k, k] -> out [k, k].
inline void finish_gram(const std::vector<double>& partials, int64_t parts, int64_t k, double* out) {
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      double total = 0;
      for (int64_t p = 0; p < parts; ++p) total += partials[(p * k + i) * k + j];
      out[i * k + j] = out[j * k + i] = total;
    }
  }
}

}  // namespace frog
