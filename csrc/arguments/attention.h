// Arguments of attention_jvp, checked alike on every device.
#pragma once

#include <array>
#include <cmath>

#include "../checks.h"

namespace frog {

/// All but devices. Returns k.
inline int64_t check_attention(const char* op, const Tensor& query, const std::optional<Tensor>& dquery,
                               const Tensor& key, const std::optional<Tensor>& dkey, const Tensor& value,
                               const std::optional<Tensor>& dvalue, const std::optional<Tensor>& mask, double scale) {
  const Tensor* primals[3] = {&query, &key, &value};
  const std::optional<Tensor>* tangents[3] = {&dquery, &dkey, &dvalue};
  const char* names[3] = {"query", "key", "value"};
  const char* tangent_names[3] = {"dquery", "dkey", "dvalue"};
  for (int j = 0; j < 3; ++j) {
    check_floating(op, names[j], *primals[j]);
    check_dtype(op, names[j], *primals[j], query.scalar_type());
    STD_TORCH_CHECK(primals[j]->dim() == 4, op, ": ", names[j], " has shape ", shape_string(*primals[j]),
                    ", expected (batch, heads, length, depth)");
  }
  STD_TORCH_CHECK(query.size(3) >= 1 && key.size(0) == query.size(0) && key.size(3) == query.size(3) &&
                      key.size(1) >= 1 && query.size(1) % key.size(1) == 0,
                  op, ": key has shape ", shape_string(key),
                  ", expected (batch, kv heads, keys, depth) to match query ", shape_string(query),
                  ", with a number of heads that divides the query's");
  check_shape(op, "value", value, {key.size(0), key.size(1), key.size(2), value.size(3)});
  STD_TORCH_CHECK(dquery || dkey || dvalue, op, ": nothing is perturbed; give at least one of dquery, dkey and dvalue");
  STD_TORCH_CHECK(std::isfinite(scale), op, ": scale is ", scale, "; expected a finite number");
  int64_t k = 0;
  for (int j = 0; j < 3; ++j) {
    if (!*tangents[j]) continue;
    const Tensor& t = **tangents[j];
    check_floating(op, tangent_names[j], t);
    check_tangents(op, tangent_names[j], t, *primals[j]);
    STD_TORCH_CHECK(k == 0 || t.size(0) == k, op, ": ", tangent_names[j], " has k = ", t.size(0),
                    ", but another tangent has k = ", k);
    k = t.size(0);
  }
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool || is_floating(mask->scalar_type()), op,
                    ": mask has dtype ", dtype_string(mask->scalar_type()),
                    "; accepted are bool and the floating dtypes");
    const int64_t full[4] = {query.size(0), query.size(1), query.size(2), key.size(2)};
    bool fits = mask->dim() <= 4;
    for (int64_t j = 1; fits && j <= mask->dim(); ++j) fits = mask->size(-j) == full[4 - j] || mask->size(-j) == 1;
    STD_TORCH_CHECK(fits, op, ": mask has shape ", shape_string(*mask), ", expected to broadcast to ",
                    shape_string(full, 4));
  }
  return k;
}

/// Strides of a mask over batch, head, query and key; 0 where it is broadcast.
inline std::array<int64_t, 4> attention_mask_strides(const Tensor& mask) {
  std::array<int64_t, 4> strides{};
  for (int64_t j = 1; j <= mask.dim(); ++j) {
    strides[4 - j] = mask.size(-j) == 1 ? 0 : mask.stride(mask.dim() - j);
  }
  return strides;
}

}  // namespace frog
