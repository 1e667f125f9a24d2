// Reading and writing tensors of any floating dtype in blocks of float or double, so that kernels are written for these
// two alone.
#pragma once

#include "draw.h"

namespace frog {

/// The type to compute in: double where any of the tensors is double, else float.
inline bool any_double(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors) {
    if (t != nullptr && t->scalar_type() == ScalarType::Double) return true;
  }
  return false;
}

template <class C>
constexpr ScalarType scalar_type_of() {
  return sizeof(C) == sizeof(float) ? ScalarType::Float : ScalarType::Double;
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
    dispatch_floating("read", type_, [&](auto zero) {
      using T = decltype(zero);
      const T* values = reinterpret_cast<const T*>(from);
      for (int64_t j = 0; j < n; ++j) scratch[j] = static_cast<C>(values[j]);
    });
    return scratch;
  }

 private:
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
    dispatch_floating("write", type_, [&](auto zero) {
      using T = decltype(zero);
      T* values = reinterpret_cast<T*>(data_ + at * size_);
      for (int64_t j = 0; j < n; ++j) values[j] = static_cast<T>(scratch[j]);
    });
  }

 private:
  char* data_;
  int64_t size_;
  ScalarType type_;
};

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

}  // namespace frog
