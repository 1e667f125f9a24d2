// Arguments that say which tangents are meant, checked alike on every device. What `state` holds is not: only the CPU
// can read it without waiting.
#pragma once

#include <cmath>

#include "../checks.h"
#include "../distributions.h"

namespace frog {

inline void check_draw(const char* op, const Tensor& state, int64_t k, int64_t first, int64_t distribution) {
  check_k(op, k);
  check_dtype(op, "state", state, ScalarType::Long);
  STD_TORCH_CHECK(state.dim() == 1 && state.is_contiguous(), op, ": state has shape ", shape_string(state),
                  ", expected a contiguous vector [seed, step]");
  STD_TORCH_CHECK(first >= 0 && first <= (int64_t{1} << 32) - k, op, ": first is ", first, " with k = ", k,
                  "; tangent indices must lie in [0, 2^32)");
  if (distribution == kStandardBasis) {
    STD_TORCH_CHECK(state.size(0) >= first + k, op, ": state holds ", state.size(0),
                    " coordinates, but tangents up to ", first + k, " are asked for");
    return;
  }
  STD_TORCH_CHECK(distribution == kNormal || distribution == kRademacher, op, ": distribution is ", distribution,
                  "; accepted are 0 (normal), 1 (Rademacher) and 2 (standard basis)");
  STD_TORCH_CHECK(state.size(0) == 2, op, ": state has ", state.size(0), " elements, expected 2: [seed, step]");
}

/// Elements handed to one thread of the CPU at a time. A multiple of both group sizes, so that no group is drawn by two
/// threads.
constexpr int64_t kDrawChunk = 8192;

inline void check_range(const char* op, int64_t numel, int64_t offset, const char* name = "offset") {
  STD_TORCH_CHECK(numel >= 0, op, ": numel is ", numel, "; it must not be negative");
  STD_TORCH_CHECK(offset >= 0, op, ": ", name, " is ", offset, "; it must not be negative");
  // room to round the end up to whole chunks
  STD_TORCH_CHECK(offset <= INT64_MAX - kDrawChunk - numel, op, ": ", name, " is ", offset, " with ", numel,
                  " elements; the global tangent vector ends at 2^63 - 8193");
}

inline void check_drawn_dtype(const char* op, ScalarType dtype) {
  STD_TORCH_CHECK(is_floating(dtype), op, ": dtype is ", dtype_string(dtype),
                  "; accepted are float32, float64, bfloat16 and float16");
}

inline void check_coefficients(const char* op, const Tensor& coefficients) {
  check_floating(op, "coefficients", coefficients);
  STD_TORCH_CHECK(coefficients.dim() == 1 && coefficients.size(0) >= 1, op, ": coefficients has shape ",
                  shape_string(coefficients), ", expected (k,) with k >= 1");
}

/// Coefficients [k, B] of B samples of numel elements each.
inline void check_samples(const char* op, const Tensor& coefficients, int64_t numel, int64_t offset) {
  check_floating(op, "coefficients", coefficients);
  STD_TORCH_CHECK(coefficients.dim() == 2 && coefficients.size(0) >= 1, op, ": coefficients has shape ",
                  shape_string(coefficients), ", expected (k, B) with k >= 1");
  check_range(op, numel, offset);
  const int64_t batch = coefficients.size(1);
  STD_TORCH_CHECK(batch == 0 || numel <= INT64_MAX / batch, op, ": numel is ", numel, " in each of ", batch,
                  " samples; all together must stay below 2^63");
  check_range(op, numel * batch, offset);
}

/// A step of SGD, as torch.optim.SGD does it. fresh: the buffer holds nothing yet.
struct Sgd {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, fresh;
};

inline void check_sgd(const char* op, const Tensor& self, const std::optional<Tensor>& buffer, const Sgd& s) {
  check_floating(op, "self", self);
  check_written(op, "self", self);
  STD_TORCH_CHECK(std::isfinite(s.lr), op, ": lr is ", s.lr, "; expected a finite number");
  STD_TORCH_CHECK(std::isfinite(s.dampening), op, ": dampening is ", s.dampening, "; expected a finite number");
  STD_TORCH_CHECK(s.momentum >= 0 && std::isfinite(s.momentum), op, ": momentum is ", s.momentum,
                  "; expected a finite number >= 0");
  STD_TORCH_CHECK(s.weight_decay >= 0 && std::isfinite(s.weight_decay), op, ": weight_decay is ", s.weight_decay,
                  "; expected a finite number >= 0");
  STD_TORCH_CHECK(!s.nesterov || (s.momentum > 0 && s.dampening == 0), op, ": nesterov needs momentum > 0 and ",
                  "dampening 0, but momentum is ", s.momentum, " and dampening is ", s.dampening);
  STD_TORCH_CHECK(buffer.has_value() == (s.momentum > 0), op, ": buffer is ", buffer ? "given" : "missing",
                  ", but momentum is ", s.momentum, "; a buffer is needed where momentum > 0, and only there");
  if (!buffer) return;
  check_dtype(op, "buffer", *buffer, self.scalar_type());
  check_shape(op, "buffer", *buffer, shape_of(self));
  check_written(op, "buffer", *buffer);
  STD_TORCH_CHECK(!overlap(*buffer, self), op, ": buffer and self share memory; expected a buffer of its own");
}

/// Elements of all blocks [k, numels[b]], one behind the other.
inline int64_t check_numels(const char* op, int64_t k, const std::vector<int64_t>& numels,
                            const char* name = "numels") {
  check_k(op, k);
  int64_t total = 0;
  for (size_t b = 0; b < numels.size(); ++b) {
    const int64_t numel = numels[b];
    STD_TORCH_CHECK(numel >= 0 && numel <= (INT64_MAX - total) / k, op, ": ", name, "[", b, "] is ", numel,
                    "; expected at least 0, and below 2^63 elements in all");
    total += k * numel;
  }
  return total;
}

/// The same, for blocks that begin at offsets[b] of the global tangent vector.
inline int64_t check_ranges(const char* op, int64_t k, const std::vector<int64_t>& numels,
                            const std::vector<int64_t>& offsets) {
  STD_TORCH_CHECK(numels.size() == offsets.size(), op, ": offsets has ", offsets.size(), " elements, expected ",
                  numels.size(), ", one for each of numels");
  for (size_t b = 0; b < numels.size(); ++b) check_range(op, numels[b], offsets[b], "an offset");
  return check_numels(op, k, numels);
}

inline void check_gram_blocks(const char* op, const Tensor& blocks, int64_t k, const std::vector<int64_t>& numels) {
  check_floating(op, "blocks", blocks);
  check_shape(op, "blocks", blocks, {check_numels(op, k, numels)});
}

inline void check_combine_blocks(const char* op, const Tensor& blocks, int64_t k, const std::vector<int64_t>& numels,
                                 const Tensor& coefficients) {
  check_gram_blocks(op, blocks, k, numels);
  check_coefficients(op, coefficients);
  STD_TORCH_CHECK(coefficients.size(0) == k, op, ": coefficients has ", coefficients.size(0), " elements, expected ",
                  k);
}

inline void check_gram(const char* op, const Tensor& tangents) {
  check_floating(op, "tangents", tangents);
  STD_TORCH_CHECK(tangents.dim() == 2, op, ": tangents has shape ", shape_string(tangents), ", expected (k, n)");
  check_k(op, tangents.size(0));
}

}  // namespace frog
