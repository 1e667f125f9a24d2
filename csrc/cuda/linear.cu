// linear_jvp: y = act(x W^T + b) and k tangents dy_i = act'(.) (dx_i W^T + x dW_i^T + db_i + v_i); csrc/cpu/linear.cpp
// is its twin.
//
// Products with the weight and with supplied weight tangents or their factors are the library's, incoming tangents as k
// * rows rows at once. Products with sampled weight tangents are kernels/linear.cuh's, which also add the rest and
// apply the slope. Tangents are computed in the dtype of dy: dx's where given, else x's.
#include "kernels/linear.cuh"

#include "../arguments/linear.h"
#include "dual.h"

namespace frog {

// In linear_sampled.cu, so that the two compile side by side.
extern template void launch_sampled_product<float>(const SampledProduct<float>&, int64_t, cudaStream_t);
extern template void launch_sampled_product<double>(const SampledProduct<double>&, int64_t, cudaStream_t);
extern template void launch_sampled_product<bf16>(const SampledProduct<bf16>&, int64_t, cudaStream_t);
extern template void launch_sampled_product<fp16>(const SampledProduct<fp16>&, int64_t, cudaStream_t);

namespace {

constexpr const char* kOp = "linear_jvp";
constexpr int64_t kMostTangents = 65535;  // the largest grid

template <class T>
constexpr ScalarType kType = ScalarType::Undefined;
template <>
constexpr ScalarType kType<float> = ScalarType::Float;
template <>
constexpr ScalarType kType<double> = ScalarType::Double;
template <>
constexpr ScalarType kType<bf16> = ScalarType::BFloat16;
template <>
constexpr ScalarType kType<fp16> = ScalarType::Half;

// Sampled bias tangents [k, out]
Tensor sampled_bias(const LinearArguments& a, int64_t out, ScalarType dtype) {
  std::array<StableIValue, 7> stack{detail::box(*a.state),       detail::box(a.k),     detail::box(out),
                                    detail::box(*a.bias_offset), detail::box(a.first), detail::box(a.distribution),
                                    detail::box(dtype)};
  return detail::call_for_tensor("frog_cuda::sample_tangents", "", stack.data());
}

// Gram matrix [k, k] of the sampled weight and bias tangents
Tensor sampled_gram(const LinearArguments& a, const LinearSizes& s, cudaStream_t stream) {
  const auto gram_of = [&](int64_t numel, int64_t offset) {
    std::array<StableIValue, 6> stack{detail::box(*a.state), detail::box(a.k),     detail::box(numel),
                                      detail::box(offset),   detail::box(a.first), detail::box(a.distribution)};
    return detail::call_for_tensor("frog_cuda::tangent_gram", "", stack.data());
  };
  if (!a.sampled()) return torch::stable::new_zeros(a.x, {a.k, a.k}, ScalarType::Double);
  if (!a.weight_offset) return gram_of(s.out, *a.bias_offset);
  Tensor gram = gram_of(s.out * s.in, *a.weight_offset);
  if (a.bias_offset) launch_add(out<double>(gram), in<double>(gram_of(s.out, *a.bias_offset)), a.k * a.k, stream);
  return gram;
}

// y [rows, out] holds x W^T; gains the bias and goes through the activation, whose slopes are returned in C.
template <class C>
std::optional<Tensor> finish_primal(const LinearArguments& a, const LinearSizes& s, Tensor& y, cudaStream_t stream) {
  std::optional<Tensor> slope;
  if (a.activation != kIdentity) slope = new_on(y, {s.rows, s.out}, kType<C>);
  if (!slope && !a.bias) return slope;
  const std::optional<Tensor> bias = dense_as(a.bias, y.scalar_type());
  dispatch_floating(kOp, y.scalar_type(), [&](auto zero) {
    using X = decltype(zero);
    launch_activate_rows(out<X>(y), in<X>(bias), s.rows, s.out, a.activation, a.alpha, a.beta,
                         slope ? out<C>(*slope) : nullptr, stream);
  });
  return slope;
}

// dy [k, rows, out] in T
template <class T>
Tensor tangents(const LinearArguments& a, const LinearSizes& s, const std::optional<Tensor>& slope,
                cudaStream_t stream) {
  using C = typename Compute<T>::type;
  using E = typename RowParts<T>::E;
  constexpr ScalarType type = kType<T>;
  const int64_t k = a.k, rows = s.rows, in_ = s.in, out_ = s.out;
  Tensor dy = new_on(a.x, {k, rows, out_}, type);
  bool filled = false;
  if (a.dx) {
    const Tensor dx = torch::stable::view(dense_as(*a.dx, type), {k * rows, in_});
    Tensor dy_rows = torch::stable::view(dy, {k * rows, out_});
    mm_out(dy_rows, dx, torch::stable::transpose(to_dtype(a.weight, type), 0, 1));
    filled = true;
  }
  Tensor x;  // [rows, in]
  if (a.dweight || a.weight_offset || a.left) x = torch::stable::view(dense_as(a.x, type), {rows, in_});
  std::optional<Tensor> product;
  if (a.dweight) {
    const Tensor x_k = as_strided(x, {k, rows, in_}, {0, in_, 1}, x.storage_offset());
    const Tensor dweight = torch::stable::transpose(dense_as(*a.dweight, type), 1, 2);  // [k, in, out]
    if (filled) product = new_on(a.x, {k, rows, out_}, type);
    bmm_out(filled ? *product : dy, x_k, dweight);
    filled = true;
  }
  if (a.left) {  // (x right_i^T) left_i
    const int64_t r = a.left->size(1);
    const Tensor right = torch::stable::view(dense_as(*a.right, type), {k * r, in_});
    Tensor inner = new_on(a.x, {rows, k * r}, type);
    mm_out(inner, x, torch::stable::transpose(right, 0, 1));
    if (filled) product = new_on(a.x, {k, rows, out_}, type);
    bmm_out(filled ? *product : dy, as_strided(inner, {k, rows, r}, {r, k * r, 1}, 0), dense_as(*a.left, type));
    filled = true;
  }
  if (a.weight_offset && a.distribution == kStandardBasis) {
    if (!filled) torch::stable::zero_(dy);
    filled = true;
    launch_basis_product(in<T>(x), rows, in_, out_, in<int64_t>(*a.state) + a.first, k, *a.weight_offset, out<T>(dy),
                         stream);
  }
  const std::optional<Tensor> dbias = a.bias_offset ? sampled_bias(a, out_, type) : dense_as(a.dbias, type);
  const std::optional<Tensor> activity = dense_as(a.activity, type);

  Finish<T> finish{};
  finish.dy = out<T>(dy), finish.filled = filled, finish.product = in<T>(product);
  finish.dbias = in<T>(dbias), finish.activity = in<T>(activity), finish.slope = in<C>(slope);
  finish.stops = stops_tangents(static_cast<int>(a.activation));
  finish.k = k, finish.rows = rows, finish.out = out_, finish.period = s.period;
  std::optional<Tensor> packed, partials;
  if (a.weight_offset && a.distribution != kStandardBasis && rows > 0 && in_ > 0 && out_ > 0) {
    SampledProduct<T> p{};
    if constexpr (RowParts<T>::kParts == 1) p.x = in<T>(x), p.ld = p.width = in_;
    if (!reads_unpacked(in<T>(x), in_)) {
      const int64_t columns = packed_columns(in_);
      packed = new_on(x, {RowParts<T>::kParts, rows, columns}, kType<E>);
      launch_pack_rows(in<T>(x), rows, in_, out<E>(*packed), stream);
      p.x = in<E>(*packed), p.ld = p.width = columns;
    }
    p.rows = rows, p.in = in_, p.out = out_, p.k = k;
    p.state = in<int64_t>(*a.state), p.first = a.first, p.offset = *a.weight_offset;
    p.split_columns = split_columns<T>(rows, in_, out_, k);
    const int64_t splits = ceil_div(in_, p.split_columns);
    p.finish = finish;
    if (splits > 1) {
      partials = new_on(x, {splits, k, rows, out_}, kType<C>);
      p.partials = out<C>(*partials);
      finish.partials = p.partials, finish.splits = splits;
    }
    launch_sampled_product(p, a.distribution, stream);
    if (splits == 1) return dy;  // finished as it was written
  }
  const bool as_it_is = filled && !product && !partials && !dbias && !activity && !slope;
  if (!as_it_is) launch_finish(finish, stream);
  return dy;
}

std::tuple<Tensor, Tensor, Tensor> linear_jvp(const Tensor& x, const std::optional<Tensor>& dx, const Tensor& weight,
                                              const std::optional<Tensor>& bias, const std::optional<Tensor>& dweight,
                                              const std::optional<Tensor>& dbias, const std::optional<Tensor>& activity,
                                              const std::optional<Tensor>& state, int64_t k, int64_t first,
                                              int64_t distribution, std::optional<int64_t> weight_offset,
                                              std::optional<int64_t> bias_offset, int64_t activation, double alpha,
                                              double beta, bool want_gram, const std::optional<Tensor>& left,
                                              const std::optional<Tensor>& right) {
  const LinearArguments a{x,     dx,           weight,        bias,        dweight,    dbias, activity, state, k,
                          first, distribution, weight_offset, bias_offset, activation, alpha, beta,     left,  right};
  a.for_each([&](const char* name, const Tensor& t) { check_same_device(kOp, name, t, x); });
  const LinearSizes s = check_linear(kOp, a);
  STD_TORCH_CHECK(k <= kMostTangents, kOp, ": k is ", k, "; accepted on a GPU are up to ", kMostTangents, " tangents");
  const OnDevice stream(x);
  Tensor y = new_on(x, {s.rows, s.out}, x.scalar_type());
  mm_out(y, torch::stable::view(as_contiguous(x), {s.rows, s.in}), torch::stable::transpose(weight, 0, 1));
  std::optional<Tensor> dy;
  dispatch_floating(kOp, dx ? dx->scalar_type() : x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const std::optional<Tensor> slope = finish_primal<typename Compute<T>::type>(a, s, y, stream);
    dy = tangents<T>(a, s, slope, stream);
  });
  const Tensor gram = want_gram ? sampled_gram(a, s, stream) : torch::stable::new_empty(x, {0, 0}, ScalarType::Double);
  return {torch::stable::view(y, s.y_shape), torch::stable::view(*dy, s.dy_shape), gram};
}

// The library's order of sums may depend on the number of rows here; on CPUs it does not (csrc/cpu/linear.cpp).
Tensor linear_rows(const Tensor& x, const Tensor& weight) {
  const char* op = "linear_rows";
  check_same_device(op, "weight", weight, x);
  check_linear_rows(op, x, weight);
  const OnDevice current(x);
  std::vector<int64_t> shape = shape_of(x);
  const int64_t in_ = shape.back(), out_ = weight.size(0);
  int64_t rows = 1;
  for (size_t j = 0; j + 1 < shape.size(); ++j) rows *= shape[j];
  shape.back() = out_;
  Tensor y = new_on(x, {rows, out_}, x.scalar_type());
  mm_out(y, torch::stable::view(as_contiguous(x), {rows, in_}), torch::stable::transpose(weight, 0, 1));
  return torch::stable::view(y, shape);
}

Tensor linear_gradient(const Tensor& gradient, const Tensor& x) {
  const char* op = "linear_gradient";
  check_same_device(op, "gradient", gradient, x);
  check_same_device(op, "x", x, gradient);
  check_linear_gradient(op, gradient, x);
  const OnDevice current(x);
  Tensor result = new_on(x, {gradient.size(1), x.size(1)}, gradient.scalar_type());  // [out, in]
  mm_out(result, torch::stable::transpose(gradient, 0, 1), x);
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CUDA, m) {
  m.impl("linear_jvp", TORCH_BOX(&linear_jvp));
  m.impl("linear_rows", TORCH_BOX(&linear_rows));
  m.impl("linear_gradient", TORCH_BOX(&linear_gradient));
}

}  // namespace
}  // namespace frog
