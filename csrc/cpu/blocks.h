// Reading and writing tensors of any floating dtype in blocks of float or double, so that kernels are written for these
// two alone.
#pragma once

#include "draw.h"

namespace frog {

/// Whether to compute in double: where any of the tensors (null: not given) is double.
inline bool any_double(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors) {
    if (t != nullptr && t->scalar_type() == ScalarType::Double) return true;
  }
  return false;
}

/// Whether a kernel that computes in `compute` reads or writes tangents of this type itself, row by row.
inline bool reads_low(ScalarType type, ScalarType compute) {
  return type == ScalarType::BFloat16 && compute == ScalarType::Float;
}

template <class C>
constexpr ScalarType scalar_type_of() {
  return sizeof(C) == sizeof(float) ? ScalarType::Float : ScalarType::Double;
}

template <class C>
inline const MathKernels<C>& math() {
  if constexpr (std::is_same_v<C, float>) {
    return simd().math_f32;
  } else {
    return simd().math_f64;
  }
}

/// A dense tensor that is read as C.
template <class C>
class Source {
 public:
  Source() = default;
  explicit Source(const Tensor& t)
      : data_(static_cast<const char*>(t.const_data_ptr())), size_(t.element_size()), type_(t.scalar_type()) {}
  explicit Source(const std::optional<Tensor>& t) : Source(t ? Source(*t) : Source()) {}

  bool given() const { return type_ != ScalarType::Undefined; }
  /// Whether `read` gives pointers into the tensor itself.
  bool direct() const { return type_ == scalar_type_of<C>(); }
  /// Elements at .. at + n: the tensor's own memory where it holds C, else converted into scratch [n]; null where no
  /// tensor was given.
  const C* read(int64_t at, int64_t n, C* scratch) const {
    if (!given()) return nullptr;
    const char* from = data_ + at * size_;
    if (direct()) return reinterpret_cast<const C*>(from);
    convert_in(from, n, scratch);
    return scratch;
  }

 private:
  void convert_in(const char* from, int64_t n, C* to) const {
    if constexpr (std::is_same_v<C, float>) {
      const uint16_t* bits = reinterpret_cast<const uint16_t*>(from);
      if (type_ == ScalarType::BFloat16) return simd().widen_bf16(bits, n, to);
      if (type_ == ScalarType::Half && simd().widen_f16) return simd().widen_f16(bits, n, to);
    }
    dispatch_floating("read", type_, [&](auto zero) {
      using T = decltype(zero);
      const T* values = reinterpret_cast<const T*>(from);
      for (int64_t j = 0; j < n; ++j) to[j] = static_cast<C>(values[j]);
    });
  }

  const char* data_ = nullptr;
  int64_t size_ = 0;
  ScalarType type_ = ScalarType::Undefined;
};

/// A dense tensor that is written as C.
template <class C>
class Sink {
 public:
  explicit Sink(Tensor& t)
      : data_(static_cast<char*>(t.mutable_data_ptr())), size_(t.element_size()), type_(t.scalar_type()) {}

  bool direct() const { return type_ == scalar_type_of<C>(); }
  /// Where to put the elements from `at` on: the tensor's own memory where it holds C, else scratch.
  C* place(int64_t at, C* scratch) const { return direct() ? reinterpret_cast<C*>(data_ + at * size_) : scratch; }
  /// Ends what `place` began: converts scratch [n] where that was the place.
  void finish(int64_t at, int64_t n, const C* scratch) const {
    if (direct()) return;
    char* to = data_ + at * size_;
    if constexpr (std::is_same_v<C, float>) {
      uint16_t* bits = reinterpret_cast<uint16_t*>(to);
      if (type_ == ScalarType::BFloat16) return simd().narrow_bf16(scratch, n, bits);
      if (type_ == ScalarType::Half && simd().narrow_f16) return simd().narrow_f16(scratch, n, bits);
    }
    dispatch_floating("write", type_, [&](auto zero) {
      using T = decltype(zero);
      T* values = reinterpret_cast<T*>(to);
      for (int64_t j = 0; j < n; ++j) values[j] = static_cast<T>(scratch[j]);
    });
  }

 private:
  char* data_;
  int64_t size_;
  ScalarType type_;
};

/// Elements that are converted, evaluated and multiplied at a time, in first-level cache.
constexpr int64_t kBlock = 2048;
/// Elements of primal and tangents that are worth a thread.
constexpr int64_t kWork = 32768;

/// Calls body(at, n) for the blocks of [0, numel), in parallel; each element counts 1 + k times.
template <class Body>
void for_each_block(int64_t numel, int64_t k, const Body& body) {
  const int64_t blocks = (numel + kBlock - 1) / kBlock;
  const int64_t grain = std::max<int64_t>(1, kWork / (kBlock * (1 + k)));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b) body(b * kBlock, std::min(kBlock, numel - b * kBlock));
  });
}

/// Results y [*shape] and dy [k, *shape]. Where they have one dtype they are neighbours in memory, so that a linear
/// layer that follows takes them in one GEMM.
inline std::tuple<Tensor, Tensor> new_dual(const Tensor& like, const std::vector<int64_t>& shape, int64_t k,
                                           ScalarType primal, ScalarType tangents) {
  std::vector<int64_t> dy_shape = shape;
  dy_shape.insert(dy_shape.begin(), k);
  if (primal != tangents) return {new_tensor(like, shape, primal), new_tensor(like, dy_shape, tangents)};
  int64_t numel = 1;
  for (const int64_t size : shape) numel *= size;
  const Tensor both = new_tensor(like, {1 + k, numel}, primal);
  return {part_of(both, 0, shape), part_of(both, numel, dy_shape)};
}

/// `t` checked as tangents of `primal`, dense; none stays none.
inline std::optional<Tensor> dense_tangents(const char* op, const char* name, const std::optional<Tensor>& t,
                                            const Tensor& primal) {
  if (!t) return std::nullopt;
  check_cpu(op, name, *t);
  check_floating(op, name, *t);
  check_tangents(op, name, *t, primal);
  return as_contiguous(*t);
}

/// Tangents [k, *s], `s` a suffix of `shape`, as dense [k, period]; short ones are repeated where `shape` is longer, so
/// that blocks are.
inline Tensor dense_activity(const char* op, const char* name, const Tensor& activity,
                             const std::vector<int64_t>& shape, int64_t k, int64_t* period) {
  constexpr int64_t kShortestRow = 1024;
  check_cpu(op, name, activity);
  check_repeated(op, name, activity, shape, k);
  int64_t numel = 1;
  for (const int64_t size : shape) numel *= size;
  const Tensor dense = as_contiguous(activity);
  *period = std::max<int64_t>(1, dense.numel() / k);
  if (*period >= kShortestRow || *period >= numel) return dense;
  const int64_t repeats = kShortestRow / *period + 1;
  const Tensor rows = as_contiguous(as_strided(dense, {k, repeats, *period}, {*period, 0, 1}, dense.storage_offset()));
  *period *= repeats;
  return rows;
}

inline const Tensor* pointer_to(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

/// coefficients [k], any floating dtype, as T and times alpha
template <class T>
std::vector<T> read_coefficients(const char* op, const Tensor& coefficients, double alpha) {
  check_cpu(op, "coefficients", coefficients);
  check_coefficients(op, coefficients);
  const Tensor wide = as_contiguous(to_dtype(coefficients, ScalarType::Double));
  const double* data = static_cast<const double*>(wide.const_data_ptr());
  std::vector<T> values(coefficients.size(0));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<T>(alpha * data[i]);
  return values;
}

}  // namespace frog
