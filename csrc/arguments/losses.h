// Arguments of cross_entropy_jvp, mse_jvp and bce_jvp, checked alike on every device.
#pragma once

#include "../checks.h"

namespace frog {

inline void check_logits(const char* op, const Tensor& logits) {
  check_floating(op, "logits", logits);
  STD_TORCH_CHECK(logits.dim() == 2, op, ": logits has shape ", shape_string(logits), ", expected (B, C)");
}

inline void check_classes(const char* op, const Tensor& target, int64_t rows, double label_smoothing) {
  check_dtype(op, "target", target, ScalarType::Long);
  check_shape(op, "target", target, {rows});
  STD_TORCH_CHECK(label_smoothing >= 0 && label_smoothing <= 1, op, ": label_smoothing is ", label_smoothing,
                  "; it must lie in [0, 1]");
}

inline void check_class_weight(const char* op, const Tensor& weight, const Tensor& logits) {
  check_dtype(op, "weight", weight, logits.scalar_type());
  check_shape(op, "weight", weight, {logits.size(1)});
}

// codes of at::Reduction; the mean divides by the sum of the weights of the targets that count
constexpr int64_t kNoReduction = 0, kMean = 1, kSum = 2;

inline void check_reduction(const char* op, int64_t reduction) {
  STD_TORCH_CHECK(reduction >= kNoReduction && reduction <= kSum, op, ": reduction is ", reduction,
                  "; accepted are 0 (none), 1 (mean) and 2 (sum)");
}

inline void check_target(const char* op, const Tensor& target, const Tensor& input) {
  check_dtype(op, "target", target, input.scalar_type());
  check_shape(op, "target", target, shape_of(input));
}

/// `t` as a dense tensor of shape `like`, to which it must broadcast.
inline Tensor broadcast(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  check_dtype(op, name, t, like.scalar_type());
  const std::vector<int64_t> shape = shape_of(like);
  std::vector<int64_t> strides(shape.size(), 0);
  const Tensor dense = as_contiguous(t);
  const int64_t extra = like.dim() - t.dim();
  bool fits = extra >= 0;
  int64_t stride = 1;
  for (int64_t j = t.dim() - 1; fits && j >= 0; --j) {
    fits = t.size(j) == 1 || t.size(j) == shape[j + extra];
    if (t.size(j) != 1) strides[j + extra] = stride;
    stride *= t.size(j);
  }
  STD_TORCH_CHECK(fits, op, ": ", name, " has shape ", shape_string(t), ", expected one that broadcasts to ",
                  shape_string(like));
  return as_contiguous(as_strided(dense, shape, strides, dense.storage_offset()));
}

}  // namespace frog
