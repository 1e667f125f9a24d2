// Arguments of embedding_jvp, checked alike on every device. What indices hold is not: only the CPU can read it without
// waiting.
#pragma once

#include "tangents.h"

namespace frog {

/// What embedding_jvp is given; tensors as they came.
struct EmbeddingArguments {
  const Tensor &indices, &weight;
  const std::optional<Tensor>&dweight, &state;
  int64_t k, first, distribution;
  std::optional<int64_t> weight_offset;
  std::optional<ScalarType> dtype;

  /// Calls body(name, tensor) for all that are given.
  template <class Body>
  void for_each(const Body& body) const {
    body("indices", indices);
    body("weight", weight);
    if (dweight) body("dweight", *dweight);
    if (state) body("state", *state);
  }
};

/// weight [rows, dim], y [places, dim], dy [k, places, dim].
struct EmbeddingSizes {
  int64_t places, rows, dim;
  std::vector<int64_t> y_shape, dy_shape;
  ScalarType tangents;
};

inline EmbeddingSizes check_embedding(const char* op, const EmbeddingArguments& a) {
  const Tensor &indices = a.indices, &weight = a.weight;
  check_k(op, a.k);
  check_floating(op, "weight", weight);
  STD_TORCH_CHECK(weight.dim() == 2, op, ": weight has shape ", shape_string(weight), ", expected (rows, dim)");
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long || indices.scalar_type() == ScalarType::Int, op,
                  ": indices has dtype ", dtype_string(indices.scalar_type()), "; accepted are int64 and int32");
  STD_TORCH_CHECK(a.dweight.has_value() != a.weight_offset.has_value(), op, ": dweight and weight_offset are ",
                  a.dweight ? "both given" : "both None", "; accepted is one of them");
  EmbeddingSizes s{indices.numel(), weight.size(0), weight.size(1), shape_of(indices), {}, weight.scalar_type()};
  if (a.dweight) {
    STD_TORCH_CHECK(!a.dtype, op, ": dtype is given beside dweight; accepted with sampled tangents only");
    check_floating(op, "dweight", *a.dweight);
    check_shape(op, "dweight", *a.dweight, {a.k, s.rows, s.dim});
    s.tangents = a.dweight->scalar_type();
  } else {
    STD_TORCH_CHECK(a.state, op, ": state is None, but sampled tangents need [seed, step]");
    check_draw(op, *a.state, a.k, a.first, a.distribution);
    check_range(op, s.rows * s.dim, *a.weight_offset, "weight_offset");
    if (a.dtype) {
      check_drawn_dtype(op, *a.dtype);
      s.tangents = *a.dtype;
    }
  }
  s.y_shape.push_back(s.dim);
  s.dy_shape = s.y_shape;
  s.dy_shape.insert(s.dy_shape.begin(), a.k);
  return s;
}

/// `t` itself where its rows lie densely, else a dense copy.
inline Tensor with_dense_rows(const Tensor& t) {
  return t.numel() == 0 || t.size(-1) == 1 || t.stride(t.dim() - 1) == 1 ? t : as_contiguous(t);
}

}  // namespace frog
