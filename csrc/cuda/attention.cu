// attention_jvp: out = softmax(scale Q K^T + mask) V and its k tangents, in one kernel; kernels/attention*.cuh say how.
#include "../arguments/attention.h"
#include "device.h"
#include "kernels/attention.cuh"

namespace frog {
namespace {

constexpr const char* kOp = "attention_jvp";

// [(k,) batch, heads, length, columns] in a dtype, neighbouring columns side by side; heads and lengths may lie in any
// order, as they do where heads were split off a projection.
Tensor prepare(const Tensor& t, ScalarType dtype) {
  const Tensor converted = to_dtype(t, dtype);
  return converted.size(-1) == 1 || converted.stride(converted.dim() - 1) == 1 ? converted : as_contiguous(converted);
}
std::optional<Tensor> prepare(const std::optional<Tensor>& t, ScalarType dtype) {
  return t ? std::optional<Tensor>(prepare(*t, dtype)) : std::nullopt;
}

template <class T>
AttentionOperand<T> operand(const Tensor& t) {
  const int64_t lead = t.dim() - 4;
  return {in<T>(t), lead ? t.stride(0) : 0, t.stride(lead), t.stride(lead + 1), t.stride(lead + 2)};
}
template <class T>
AttentionOperand<T> operand(const std::optional<Tensor>& t) {
  return t ? operand<T>(*t) : AttentionOperand<T>{};
}

AttentionMask prepare_mask(const std::optional<Tensor>& mask) {
  if (!mask) return {};
  const auto strides = attention_mask_strides(*mask);
  MaskType type = MaskType::kBool;
  switch (mask->scalar_type()) {
    case ScalarType::Double:
      type = MaskType::kFloat64;
      break;
    case ScalarType::Float:
      type = MaskType::kFloat32;
      break;
    case ScalarType::BFloat16:
      type = MaskType::kBfloat16;
      break;
    case ScalarType::Half:
      type = MaskType::kFloat16;
      break;
    default:
      break;
  }
  return {mask->const_data_ptr(), type, strides[0], strides[1], strides[2], strides[3]};
}

// The dtypes that a kernel computes on: those given where there is such a kernel, otherwise what the CPU converts to.
std::pair<ScalarType, ScalarType> kernel_dtypes(ScalarType primal, const std::optional<Tensor>* const (&tangents)[3],
                                                int64_t depth) {
  const ScalarType wide = primal == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  std::optional<ScalarType> common;
  for (const std::optional<Tensor>* t : tangents) {
    if (!*t) continue;
    if (common && *common != (*t)->scalar_type()) return {wide, wide};
    common = (*t)->scalar_type();
  }
  const bool low = *common == ScalarType::BFloat16 || *common == ScalarType::Half;
  const bool fits = *common == primal ? !low || depth <= kMostMmaDepth : primal == ScalarType::Float && low;
  return fits ? std::pair{primal, *common} : std::pair{wide, wide};
}

std::tuple<Tensor, Tensor> attention_jvp(const Tensor& query, const std::optional<Tensor>& dquery, const Tensor& key,
                                         const std::optional<Tensor>& dkey, const Tensor& value,
                                         const std::optional<Tensor>& dvalue, const std::optional<Tensor>& mask,
                                         bool is_causal, double scale) {
  const std::optional<Tensor>* const tangents[3] = {&dquery, &dkey, &dvalue};
  const char* const names[3] = {"dquery", "dkey", "dvalue"};
  check_same_device(kOp, "query", query, query);
  check_same_device(kOp, "key", key, query);
  check_same_device(kOp, "value", value, query);
  for (int j = 0; j < 3; ++j) {
    if (*tangents[j]) check_same_device(kOp, names[j], **tangents[j], query);
  }
  if (mask) check_same_device(kOp, "mask", *mask, query);
  const int64_t k = check_attention(kOp, query, dquery, key, dkey, value, dvalue, mask, scale);

  const OnDevice stream(query);
  const std::pair<ScalarType, ScalarType> dtypes = kernel_dtypes(query.scalar_type(), tangents, query.size(3));
  const ScalarType primal = dtypes.first, tangent = dtypes.second;
  const Tensor q = prepare(query, primal), kk = prepare(key, primal), v = prepare(value, primal);
  const std::optional<Tensor> dq = prepare(dquery, tangent), dk = prepare(dkey, tangent), dv = prepare(dvalue, tangent);
  const std::vector<int64_t> shape{query.size(0), query.size(1), query.size(2), value.size(3)};
  Tensor y = new_on(q, shape, primal);                                          // [B, H, L, Dv]
  Tensor dy = new_on(q, {k, shape[0], shape[1], shape[2], shape[3]}, tangent);  // [k, B, H, L, Dv]
  const auto go = [&](auto of_primal, auto of_tangent) {
    using T = decltype(of_primal);
    using D = decltype(of_tangent);
    AttentionProblem<T, D> p{};
    p.query = operand<T>(q);
    p.key = operand<T>(kk);
    p.value = operand<T>(v);
    p.dquery = operand<D>(dq);
    p.dkey = operand<D>(dk);
    p.dvalue = operand<D>(dv);
    p.mask = prepare_mask(mask);
    p.out = out<T>(y);
    p.dout = out<D>(dy);
    p.batch = shape[0];
    p.heads = shape[1];
    p.kv_heads = key.size(1);
    p.queries = shape[2];
    p.keys = key.size(2);
    p.depth = query.size(3);
    p.width = shape[3];
    p.k = k;
    p.causal = is_causal;
    p.scale = scale;
    launch_attention(p, stream);
  };
  dispatch_floating(kOp, tangent, [&](auto of_tangent) {
    if (primal == tangent) {
      go(of_tangent, of_tangent);
    } else if constexpr (sizeof(of_tangent) == 2) {
      go(float{}, of_tangent);
    }
  });
  const Tensor& moved = dquery ? *dquery : dkey ? *dkey : *dvalue;
  return {to_dtype(y, query.scalar_type()), to_dtype(dy, moved.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CUDA, m) { m.impl("attention_jvp", TORCH_BOX(&attention_jvp)); }

}  // namespace
}  // namespace frog
