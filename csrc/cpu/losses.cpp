// Losses per sample or per element and their tangents; the logits of a sample are read once for all k tangents.
#include <cmath>
#include <limits>

#include "blocks.h"

namespace frog {
namespace {

constexpr int64_t kWork = 16384;  // elements of primal and tangents that are worth a thread

ScalarType compute_type(std::initializer_list<const Tensor*> tensors) {
  return any_double(tensors) ? ScalarType::Double : ScalarType::Float;
}

Tensor dense(const Tensor& t, ScalarType compute) { return torch::stable::contiguous(to_dtype(t, compute)); }

template <class C>
const C* data(const std::optional<Tensor>& t) {
  return t ? static_cast<const C*>(t->const_data_ptr()) : nullptr;
}

template <class Body>
void dispatch_compute(ScalarType compute, const Body& body) {
  if (compute == ScalarType::Double) {
    body(double{});
  } else {
    body(float{});
  }
}

// loss = -(1 - s) w_t log p_t - (s / C) sum_c w_c log p_c with log p = x - lse(x). Both parts are linear in log p, and
// d(log p)_c = dx_c - sum(p dx), so dloss = sum_c g_c dx_c with g = p (sum of the weights) - the weights themselves.
std::tuple<Tensor, Tensor> cross_entropy_jvp(const Tensor& logits, const Tensor& dlogits, const Tensor& target,
                                             const std::optional<Tensor>& weight, int64_t ignore_index,
                                             double label_smoothing) {
  const char* op = "cross_entropy_jvp";
  check_cpu(op, "logits", logits);
  check_cpu(op, "dlogits", dlogits);
  check_cpu(op, "target", target);
  check_floating(op, "logits", logits);
  check_floating(op, "dlogits", dlogits);
  STD_TORCH_CHECK(logits.dim() == 2, op, ": logits has shape ", shape_string(logits), ", expected (B, C)");
  check_tangents(op, "dlogits", dlogits, logits);
  check_dtype(op, "target", target, ScalarType::Long);
  const int64_t rows = logits.size(0), classes = logits.size(1), k = dlogits.size(0);
  check_shape(op, "target", target, {rows});
  STD_TORCH_CHECK(label_smoothing >= 0 && label_smoothing <= 1, op, ": label_smoothing is ", label_smoothing,
                  ", expected a number in [0, 1]");
  const ScalarType compute = compute_type({&logits, &dlogits});
  std::optional<Tensor> w;
  if (weight) {
    check_cpu(op, "weight", *weight);
    check_floating(op, "weight", *weight);
    check_shape(op, "weight", *weight, {classes});
    w = dense(*weight, compute);
  }
  const Tensor x = dense(logits, compute), dx = dense(dlogits, compute), t = torch::stable::contiguous(target);
  const int64_t* labels = static_cast<const int64_t*>(t.const_data_ptr());
  for (int64_t b = 0; b < rows; ++b) {
    STD_TORCH_CHECK(labels[b] == ignore_index || (labels[b] >= 0 && labels[b] < classes), op, ": target[", b, "] is ",
                    labels[b], "; expected a class in [0, ", classes, ") or ignore_index ", ignore_index);
  }
  Tensor loss = new_tensor(x, {rows}, compute), dloss = new_tensor(x, {k, rows}, compute);
  dispatch_compute(compute, [&](auto zero) {
    using C = decltype(zero);
    const C *xs = static_cast<const C*>(x.const_data_ptr()), *dxs = static_cast<const C*>(dx.const_data_ptr());
    const C* ws = data<C>(w);
    C *out = static_cast<C*>(loss.mutable_data_ptr()), *dout = static_cast<C*>(dloss.mutable_data_ptr());
    const C smooth = static_cast<C>(label_smoothing / std::max<int64_t>(1, classes));
    const C sharp = static_cast<C>(1 - label_smoothing);
    const int64_t grain = std::max<int64_t>(1, kWork / std::max<int64_t>(1, classes * (1 + k)));
    torch::stable::parallel_for(0, rows, grain, [&](int64_t from, int64_t to) {
      std::vector<C> g(classes);
      for (int64_t b = from; b < to; ++b) {
        const int64_t label = labels[b];
        if (label == ignore_index) {
          out[b] = C(0);
          for (int64_t i = 0; i < k; ++i) dout[i * rows + b] = C(0);
          continue;
        }
        const C* row = xs + b * classes;
        C top = row[0];
        for (int64_t c = 1; c < classes; ++c) top = row[c] > top || row[c] != row[c] ? row[c] : top;
        C sum = C(0);
        for (int64_t c = 0; c < classes; ++c) sum += g[c] = std::exp(row[c] - top);
        const C lse = std::log(sum), own = sharp * (ws ? ws[label] : C(1));
        C total = -own * (row[label] - top - lse), weights = own;
        if (smooth > 0) {  // else a logit of -inf would give 0 * inf
          for (int64_t c = 0; c < classes; ++c) {
            const C share = smooth * (ws ? ws[c] : C(1));
            total -= share * (row[c] - top - lse);
            weights += share;
          }
        }
        out[b] = total;
        for (int64_t c = 0; c < classes; ++c) {
          g[c] = g[c] / sum * weights - smooth * (ws ? ws[c] : C(1)) - (c == label ? own : C(0));
        }
        for (int64_t i = 0; i < k; ++i) {
          const C* moved = dxs + (i * rows + b) * classes;
          C change = C(0);
          for (int64_t c = 0; c < classes; ++c) change += g[c] * moved[c];
          dout[i * rows + b] = change;
        }
      }
    });
  });
  return {to_dtype(loss, logits.scalar_type()), to_dtype(dloss, dlogits.scalar_type())};
}

// Checks a tangent of `primal` and that its k agrees with the others.
void check_moved(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& primal, int64_t* k) {
  if (!t) return;
  check_cpu(op, name, *t);
  check_floating(op, name, *t);
  check_tangents(op, name, *t, primal);
  STD_TORCH_CHECK(*k == 0 || t->size(0) == *k, op, ": ", name, " has k = ", t->size(0),
                  ", but another tangent has k = ", *k);
  *k = t->size(0);
}

std::tuple<Tensor, Tensor> mse_jvp(const Tensor& input, const std::optional<Tensor>& dinput, const Tensor& target,
                                   const std::optional<Tensor>& dtarget) {
  const char* op = "mse_jvp";
  check_cpu(op, "input", input);
  check_cpu(op, "target", target);
  check_floating(op, "input", input);
  check_dtype(op, "target", target, input.scalar_type());
  check_shape(op, "target", target, shape_of(input));
  STD_TORCH_CHECK(dinput || dtarget, op, ": dinput and dtarget are both None; at least one must be given");
  int64_t k = 0;
  check_moved(op, "dinput", dinput, input, &k);
  check_moved(op, "dtarget", dtarget, target, &k);
  const ScalarType compute = compute_type({&input, dinput ? &*dinput : nullptr, dtarget ? &*dtarget : nullptr});
  const Tensor a = dense(input, compute), b = dense(target, compute);
  std::optional<Tensor> da, db;
  if (dinput) da = dense(*dinput, compute);
  if (dtarget) db = dense(*dtarget, compute);
  std::vector<int64_t> shape = shape_of(input), dshape = shape;
  dshape.insert(dshape.begin(), k);
  Tensor loss = new_tensor(a, shape, compute), dloss = new_tensor(a, dshape, compute);
  const int64_t n = a.numel();
  dispatch_compute(compute, [&](auto zero) {
    using C = decltype(zero);
    const C *as = static_cast<const C*>(a.const_data_ptr()), *bs = static_cast<const C*>(b.const_data_ptr());
    const C *das = data<C>(da), *dbs = data<C>(db);
    C *out = static_cast<C*>(loss.mutable_data_ptr()), *dout = static_cast<C*>(dloss.mutable_data_ptr());
    torch::stable::parallel_for(0, n, std::max<int64_t>(1, kWork / (1 + k)), [&](int64_t from, int64_t to) {
      for (int64_t j = from; j < to; ++j) out[j] = (as[j] - bs[j]) * (as[j] - bs[j]);
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t j = from; j < to; ++j) {
          const C change = (das ? das[i * n + j] : C(0)) - (dbs ? dbs[i * n + j] : C(0));
          dout[i * n + j] = C(2) * (as[j] - bs[j]) * change;
        }
      }
    });
  });
  const Tensor& moved = dinput ? *dinput : *dtarget;
  return {to_dtype(loss, input.scalar_type()), to_dtype(dloss, moved.scalar_type())};
}

// `t` stretched to `shape` by zero strides, or an error.
Tensor broadcast(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& shape,
                 ScalarType compute) {
  check_cpu(op, name, t);
  check_floating(op, name, t);
  const int64_t missing = static_cast<int64_t>(shape.size()) - t.dim();
  bool fits = missing >= 0;
  std::vector<int64_t> strides(shape.size(), 0);
  for (int64_t j = 0; fits && j < t.dim(); ++j) {
    fits = t.size(j) == shape[missing + j] || t.size(j) == 1;
    strides[missing + j] = t.size(j) == 1 ? 0 : t.stride(j);
  }
  STD_TORCH_CHECK(fits, op, ": ", name, " has shape ", shape_string(t), ", expected to broadcast to ",
                  shape_string(shape));
  return dense(as_strided(t, shape, strides, t.storage_offset()), compute);
}

template <class C>
struct Element {
  C loss, slope;
};

// log p = -softplus(-x) and log(1 - p) = -x - softplus(-x), with softplus(-x) = max(-x, 0) + log1p(exp(-|x|))
template <class C>
Element<C> with_logits(C x, C t, C q) {
  const C mixed = C(1) + (q - C(1)) * t;
  const C softplus = std::max(-x, C(0)) + std::log1p(std::exp(-std::abs(x)));
  const C sigmoid = x >= 0 ? std::exp(-x) / (C(1) + std::exp(-x)) : C(1) / (C(1) + std::exp(x));  // of -x
  return {(C(1) - t) * x + mixed * softplus, (C(1) - t) - mixed * sigmoid};
}

// PyTorch's own limits: logarithms at least -100, p (1 - p) at least 1e-12
template <class C>
Element<C> of_probability(C p, C t) {
  const C one = std::max(std::log(p), C(-100)), other = std::max(std::log1p(-p), C(-100));
  return {(t - C(1)) * other - t * one, (p - t) / std::max(p * (C(1) - p), C(1e-12))};
}

std::tuple<Tensor, Tensor> bce_jvp(const Tensor& input, const Tensor& dinput, const Tensor& target,
                                   const std::optional<Tensor>& weight, const std::optional<Tensor>& pos_weight,
                                   bool logits) {
  const char* op = "bce_jvp";
  check_cpu(op, "input", input);
  check_cpu(op, "target", target);
  check_floating(op, "input", input);
  check_floating(op, "target", target);
  check_shape(op, "target", target, shape_of(input));
  int64_t k = 0;
  check_moved(op, "dinput", dinput, input, &k);
  STD_TORCH_CHECK(logits || !pos_weight, op, ": pos_weight is given, but with_logits is false; it needs logits");
  const ScalarType compute = compute_type({&input, &dinput, &target});
  const std::vector<int64_t> shape = shape_of(input);
  const Tensor x = dense(input, compute), dx = dense(dinput, compute), t = dense(target, compute);
  std::optional<Tensor> w, q;
  if (weight) w = broadcast(op, "weight", *weight, shape, compute);
  if (pos_weight) q = broadcast(op, "pos_weight", *pos_weight, shape, compute);
  Tensor loss = new_tensor(x, shape, compute), dloss = new_tensor(x, shape_of(dinput), compute);
  const int64_t n = x.numel();
  dispatch_compute(compute, [&](auto zero) {
    using C = decltype(zero);
    const C *xs = static_cast<const C*>(x.const_data_ptr()), *ts = static_cast<const C*>(t.const_data_ptr());
    const C *dxs = static_cast<const C*>(dx.const_data_ptr()), *ws = data<C>(w), *qs = data<C>(q);
    C *out = static_cast<C*>(loss.mutable_data_ptr()), *dout = static_cast<C*>(dloss.mutable_data_ptr());
    torch::stable::parallel_for(0, n, std::max<int64_t>(1, kWork / (1 + k)), [&](int64_t from, int64_t to) {
      for (int64_t j = from; j < to; ++j) {
        const Element<C> e = logits ? with_logits(xs[j], ts[j], qs ? qs[j] : C(1)) : of_probability(xs[j], ts[j]);
        const C factor = ws ? ws[j] : C(1);
        out[j] = factor * e.loss;
        for (int64_t i = 0; i < k; ++i) dout[i * n + j] = factor * e.slope * dxs[i * n + j];
      }
    });
  });
  return {to_dtype(loss, input.scalar_type()), to_dtype(dloss, dinput.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CPU, m) {
  m.impl("cross_entropy_jvp", TORCH_BOX(&cross_entropy_jvp));
  m.impl("mse_jvp", TORCH_BOX(&mse_jvp));
  m.impl("bce_jvp", TORCH_BOX(&bce_jvp));
}

}  // namespace
}  // namespace frog
