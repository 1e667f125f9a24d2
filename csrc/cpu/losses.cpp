// cross_entropy_jvp, mse_jvp and bce_jvp: one loss for each sample or element, and its k directional derivatives. The
// slope of a loss is computed once and multiplied with all k tangents.
#include <cmath>
#include <limits>

#include "../arguments/losses.h"
#include "blocks.h"

namespace frog {
namespace {

// code of softplus in POINTWISE of frog_cuda/ops/pointwise.py
constexpr int64_t kSoftplus = 7;

// ---- cross entropy

template <class C>
struct CrossEntropy {
  int64_t rows, classes, k, ignore_index;
  C smoothing;
  const int64_t* target;  // [rows]
  std::vector<C> weight;  // [classes], or empty where all are 1
  C weight_sum;
  Source<C> x, dx;  // [rows, classes], [k, rows, classes]
};

// loss and gradient [classes] of one row x; the loss is linear in log softmax(x)
template <class C>
C loss_of_row(const CrossEntropy<C>& job, const C* x, int64_t target, C* gradient) {
  C shift;
  const C lower = std::log(math<C>().softmax(x, job.classes, gradient, &shift));
  const auto weight = [&](int64_t c) { return job.weight.empty() ? C(1) : job.weight[c]; };
  const C at_target = (C(1) - job.smoothing) * weight(target);
  const C at_each = job.smoothing / static_cast<C>(job.classes);
  const C total = at_target + at_each * job.weight_sum;
  C loss = -at_target * ((x[target] - shift) - lower);
  if (job.smoothing > 0) {  // else a logit of -inf would give 0 * inf
    C sum = 0;
    for (int64_t c = 0; c < job.classes; ++c) sum += weight(c) * ((x[c] - shift) - lower);
    loss -= at_each * sum;
    for (int64_t c = 0; c < job.classes; ++c) gradient[c] = total * gradient[c] - at_each * weight(c);
  } else {
    for (int64_t c = 0; c < job.classes; ++c) gradient[c] *= total;
  }
  gradient[target] -= at_target;
  return loss;
}

// loss [rows], dloss [k, rows]
template <class C>
void run(const CrossEntropy<C>& job, C* loss, C* dloss) {
  const int64_t n = job.classes, block = std::max<int64_t>(1, kBlock / std::max<int64_t>(1, n));
  const int64_t grain = std::max<int64_t>(1, kWork / std::max<int64_t>(1, block * n * (1 + job.k)));
  torch::stable::parallel_for(0, (job.rows + block - 1) / block, grain, [&](int64_t from, int64_t to) {
    std::vector<C> gradient(block * n), scratch(block * n);
    for (int64_t first = from * block; first < std::min(job.rows, to * block); first += block) {
      const int64_t rows = std::min(block, job.rows - first);
      const auto ignored = [&](int64_t r) { return job.target[first + r] == job.ignore_index; };
      const C* x = job.x.read(first * n, rows * n, scratch.data());
      for (int64_t r = 0; r < rows; ++r) {
        C* g = gradient.data() + r * n;
        loss[first + r] = ignored(r) ? C(0) : loss_of_row(job, x + r * n, job.target[first + r], g);
        if (ignored(r)) std::fill(g, g + n, C(0));
      }
      for (int64_t i = 0; i < job.k; ++i) {
        const C* dx = job.dx.read((i * job.rows + first) * n, rows * n, scratch.data());
        C* out = dloss + i * job.rows + first;
        math<C>().dots(gradient.data(), dx, n, rows, out);
        for (int64_t r = 0; r < rows; ++r) {
          if (ignored(r)) out[r] = C(0);  // whatever the tangent, even where it is not finite
        }
      }
    }
  });
}

// Sums or means of loss [rows] and of each row of dloss [k, rows], in double: results [1] and [k].
template <class C>
void reduce(const CrossEntropy<C>& job, bool mean, const C* loss, const C* dloss, C* value, C* derivatives) {
  double total = 0;
  for (int64_t r = 0; mean && r < job.rows; ++r) {
    if (job.target[r] == job.ignore_index) continue;
    total += job.weight.empty() ? 1.0 : static_cast<double>(job.weight[job.target[r]]);
  }
  const int64_t grain = std::max<int64_t>(1, kWork / std::max<int64_t>(1, job.rows));
  torch::stable::parallel_for(0, 1 + job.k, grain, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const C* row = i == 0 ? loss : dloss + (i - 1) * job.rows;
      double sum = 0;
      for (int64_t r = 0; r < job.rows; ++r) sum += static_cast<double>(row[r]);
      *(i == 0 ? value : derivatives + i - 1) = static_cast<C>(mean ? sum / total : sum);
    }
  });
}

std::tuple<Tensor, Tensor> cross_entropy_jvp(const Tensor& logits_, const Tensor& dlogits_, const Tensor& target_,
                                             const std::optional<Tensor>& weight_, int64_t ignore_index,
                                             double label_smoothing, int64_t reduction) {
  const char* op = "cross_entropy_jvp";
  check_cpu(op, "logits", logits_);
  check_logits(op, logits_);
  const Tensor dlogits = *dense_tangents(op, "dlogits", dlogits_, logits_);
  const int64_t rows = logits_.size(0), classes = logits_.size(1), k = dlogits.size(0);
  check_cpu(op, "target", target_);
  check_classes(op, target_, rows, label_smoothing);
  check_reduction(op, reduction);
  const Tensor target = as_contiguous(target_);
  const int64_t* t = static_cast<const int64_t*>(target.const_data_ptr());
  for (int64_t r = 0; r < rows; ++r) {
    STD_TORCH_CHECK(t[r] == ignore_index || (t[r] >= 0 && t[r] < classes), op, ": target[", r, "] is ", t[r],
                    "; accepted are class indices from 0 to ", classes - 1, " and ignore_index ", ignore_index);
  }
  std::optional<Tensor> weight;
  if (weight_) {
    check_cpu(op, "weight", *weight_);
    check_class_weight(op, *weight_, logits_);
    weight = as_contiguous(*weight_);
  }
  const Tensor logits = as_contiguous(logits_);
  const bool each = reduction == kNoReduction;
  Tensor loss = new_tensor(logits, each ? std::vector<int64_t>{rows} : std::vector<int64_t>{}, logits.scalar_type());
  Tensor dloss =
      new_tensor(logits, each ? std::vector<int64_t>{k, rows} : std::vector<int64_t>{k}, dlogits.scalar_type());
  const auto go = [&](auto zero) {
    using C = decltype(zero);
    CrossEntropy<C> job{rows, classes, k,    ignore_index,      static_cast<C>(label_smoothing),
                        t,    {},      C(0), Source<C>(logits), Source<C>(dlogits)};
    double sum = static_cast<double>(classes);
    if (weight) {
      job.weight.resize(classes);
      const C* values = Source<C>(weight).read(0, classes, job.weight.data());
      std::copy(values, values + classes, job.weight.data());
      sum = 0;
      for (const C w : job.weight) sum += static_cast<double>(w);
    }
    job.weight_sum = static_cast<C>(sum);
    const Sink<C> loss_out(loss), dloss_out(dloss);
    std::vector<C> loss_wide(each && loss_out.direct() ? 0 : rows),
        dloss_wide(each && dloss_out.direct() ? 0 : k * rows);
    C* loss_data = each ? loss_out.place(0, loss_wide.data()) : loss_wide.data();
    C* dloss_data = each ? dloss_out.place(0, dloss_wide.data()) : dloss_wide.data();
    run(job, loss_data, dloss_data);
    if (each) {
      loss_out.finish(0, rows, loss_data);
      dloss_out.finish(0, k * rows, dloss_data);
      return;
    }
    C value;
    std::vector<C> derivatives(k);
    C *value_data = loss_out.place(0, &value), *derivatives_data = dloss_out.place(0, derivatives.data());
    reduce(job, reduction == kMean, loss_data, dloss_data, value_data, derivatives_data);
    loss_out.finish(0, 1, value_data);
    dloss_out.finish(0, k, derivatives_data);
  };
  if (any_double({&logits, &dlogits})) {
    go(double{});
  } else {
    go(float{});
  }
  return {loss, dloss};
}

// ---- elementwise losses

template <class C>
struct Elementwise {
  int64_t numel, k;
  Source<C> x, target, dx, dtarget, weight, pos_weight;
  Sink<C> loss, dloss;
};

// dloss_i = slope (dx_i - dtarget_i) for one block
template <class C>
void multiply(const Elementwise<C>& job, const C* slope, int64_t at, int64_t n) {
  alignas(64) C first[kBlock], second[kBlock];
  for (int64_t i = 0; i < job.k; ++i) {
    const int64_t from = i * job.numel + at;
    const C* v = job.dtarget.read(from, n, second);
    if (v != nullptr) {
      for (int64_t j = 0; j < n; ++j) second[j] = -v[j];
      v = second;
    }
    C* out = job.dloss.place(from, first);
    math<C>().apply_slope(slope, job.dx.read(from, n, first), v, n, out);
    job.dloss.finish(from, n, out);
  }
}

template <class C>
void mse_block(const Elementwise<C>& job, int64_t at, int64_t n) {
  alignas(64) C first[kBlock], second[kBlock], slope[kBlock];
  const C* x = job.x.read(at, n, first);
  const C* t = job.target.read(at, n, second);
  C* loss = job.loss.place(at, first);
  for (int64_t j = 0; j < n; ++j) {
    const C difference = x[j] - t[j];
    loss[j] = difference * difference;
    slope[j] = C(2) * difference;
  }
  job.loss.finish(at, n, loss);
  multiply(job, slope, at, n);
}

// p = sigmoid(x), q = pos_weight: (1 - t) x + (1 + (q - 1) t) softplus(-x), as log p = -softplus(-x)
template <class C>
void bce_with_logits(const C* x, const C* t, const C* q, int64_t n, C* loss, C* slope) {
  alignas(64) C negative[kBlock], soft[kBlock];
  for (int64_t j = 0; j < n; ++j) negative[j] = -x[j];
  // beta = 1 and no threshold: the kernel is stable everywhere
  math<C>().activate(kSoftplus, C(1), std::numeric_limits<C>::infinity(), negative, n, soft, slope);
  for (int64_t j = 0; j < n; ++j) {
    const C mixed = q ? C(1) + (q[j] - C(1)) * t[j] : C(1);
    loss[j] = (C(1) - t[j]) * x[j] + mixed * soft[j];
    slope[j] = (C(1) - t[j]) - mixed * slope[j];
  }
}

// Logarithms are at least -100 and p (1 - p) at least 1e-12, a float32 at every precision, as in PyTorch.
template <class C>
void bce_of_probability(const C* p, const C* t, int64_t n, C* loss, C* slope) {
  for (int64_t j = 0; j < n; ++j) {
    const C yes = std::max(std::log(p[j]), C(-100)), no = std::max(std::log1p(-p[j]), C(-100));
    slope[j] = (p[j] - t[j]) / std::max(p[j] * (C(1) - p[j]), C(1e-12f));
    loss[j] = (t[j] - C(1)) * no - t[j] * yes;
  }
}

template <class C>
void bce_block(const Elementwise<C>& job, bool with_logits, int64_t at, int64_t n) {
  alignas(64) C first[kBlock], second[kBlock], third[kBlock], loss[kBlock], slope[kBlock];
  const C* x = job.x.read(at, n, first);
  const C* t = job.target.read(at, n, second);
  if (with_logits) {
    bce_with_logits(x, t, job.pos_weight.read(at, n, third), n, loss, slope);
  } else {
    bce_of_probability(x, t, n, loss, slope);
  }
  const C* w = job.weight.read(at, n, third);
  for (int64_t j = 0; w != nullptr && j < n; ++j) {
    loss[j] *= w[j];
    slope[j] *= w[j];
  }
  C* out = job.loss.place(at, first);
  if (job.loss.direct()) std::copy(loss, loss + n, out);
  job.loss.finish(at, n, loss);
  multiply(job, slope, at, n);
}

std::tuple<Tensor, Tensor> mse_jvp(const Tensor& input, const std::optional<Tensor>& dinput, const Tensor& target,
                                   const std::optional<Tensor>& dtarget) {
  const char* op = "mse_jvp";
  check_cpu(op, "input", input);
  check_floating(op, "input", input);
  check_cpu(op, "target", target);
  check_target(op, target, input);
  STD_TORCH_CHECK(dinput || dtarget, op, ": dinput and dtarget are both None; at least one must be given");
  const Tensor x = as_contiguous(input), t = as_contiguous(target);
  const std::optional<Tensor> dx = dense_tangents(op, "dinput", dinput, input);
  const std::optional<Tensor> dt = dense_tangents(op, "dtarget", dtarget, target);
  const Tensor& given = dx ? *dx : *dt;
  if (dx && dt) check_shape(op, "dtarget", *dt, shape_of(*dx));
  auto [loss, dloss] = new_dual(x, shape_of(x), given.size(0), x.scalar_type(), given.scalar_type());
  const auto go = [&, &loss = loss, &dloss = dloss](auto zero) {
    using C = decltype(zero);
    const Elementwise<C> job{x.numel(), given.size(0), Source<C>(x),  Source<C>(t), Source<C>(dx), Source<C>(dt), {},
                             {},        Sink<C>(loss), Sink<C>(dloss)};
    for_each_block(job.numel, job.k, [&](int64_t at, int64_t n) { mse_block(job, at, n); });
  };
  if (any_double({&x, pointer_to(dx), pointer_to(dt)})) {
    go(double{});
  } else {
    go(float{});
  }
  return {loss, dloss};
}

template <class C>
void check_probabilities(const char* op, const Source<C>& x, int64_t numel) {
  C scratch[kBlock];
  for (int64_t at = 0; at < numel; at += kBlock) {
    const int64_t n = std::min(kBlock, numel - at);
    const C* values = x.read(at, n, scratch);
    for (int64_t j = 0; j < n; ++j) {
      STD_TORCH_CHECK(values[j] >= 0 && values[j] <= 1, op, ": input holds ", values[j],
                      "; without logits all elements must lie in [0, 1]");
    }
  }
}

std::tuple<Tensor, Tensor> bce_jvp(const Tensor& input, const Tensor& dinput, const Tensor& target,
                                   const std::optional<Tensor>& weight_, const std::optional<Tensor>& pos_weight_,
                                   bool with_logits) {
  const char* op = "bce_jvp";
  check_cpu(op, "input", input);
  check_floating(op, "input", input);
  check_cpu(op, "target", target);
  check_target(op, target, input);
  STD_TORCH_CHECK(with_logits || !pos_weight_, op, ": pos_weight is given; it is accepted only with_logits");
  const Tensor x = as_contiguous(input), t = as_contiguous(target);
  const Tensor dx = *dense_tangents(op, "dinput", dinput, input);
  std::optional<Tensor> weight, pos_weight;
  if (weight_) {
    check_cpu(op, "weight", *weight_);
    weight = broadcast(op, "weight", *weight_, x);
  }
  if (pos_weight_) {
    check_cpu(op, "pos_weight", *pos_weight_);
    pos_weight = broadcast(op, "pos_weight", *pos_weight_, x);
  }
  auto [loss, dloss] = new_dual(x, shape_of(x), dx.size(0), x.scalar_type(), dx.scalar_type());
  const auto go = [&, &loss = loss, &dloss = dloss](auto zero) {
    using C = decltype(zero);
    const Elementwise<C> job{x.numel(), dx.size(0),        Source<C>(x),          Source<C>(t),  Source<C>(dx),
                             {},        Source<C>(weight), Source<C>(pos_weight), Sink<C>(loss), Sink<C>(dloss)};
    if (!with_logits) check_probabilities(op, job.x, job.numel);
    for_each_block(job.numel, job.k, [&](int64_t at, int64_t n) { bce_block(job, with_logits, at, n); });
  };
  if (any_double({&x, &dx})) {
    go(double{});
  } else {
    go(float{});
  }
  return {loss, dloss};
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CPU, m) {
  m.impl("cross_entropy_jvp", TORCH_BOX(&cross_entropy_jvp));
  m.impl("mse_jvp", TORCH_BOX(&mse_jvp));
  m.impl("bce_jvp", TORCH_BOX(&bce_jvp));
}

}  // namespace
}  // namespace frog
