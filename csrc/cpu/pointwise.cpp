// pointwise_jvp: y = f(x) and dy_i = f'(x) (dx_i + v_i). Value and slope are computed once for each element, a block at
// a time, and the slope is applied to all k tangents of the block while it lies in first-level cache.
#include "pointwise.h"

#include <cmath>

#include "blocks.h"

namespace frog {
namespace {

constexpr const char* kOp = "pointwise_jvp";
constexpr int64_t kBlock = 2048;        // elements whose slopes are held at a time
constexpr int64_t kWork = 32768;        // elements of primal and tangents that are worth a thread
constexpr int64_t kShortestRow = 1024;  // shorter activity tangents are repeated up to this length

enum Function : int64_t {
  kIdentity,
  kRelu,
  kGelu,
  kGeluTanh,
  kSilu,
  kTanh,
  kSigmoid,
  kSoftplus,
  kElu,
  kLeakyRelu,
  kHardtanh,
  kFunctions
};

template <class C>
struct Dual {
  C value, slope;
};

template <class C>
C logistic(C x) {
  return C(1) / (C(1) + std::exp(-x));
}

template <class C>
Dual<C> evaluate(int64_t function, C a, C b, C x) {
  switch (function) {
    case kRelu:
      return {x <= 0 ? C(0) : x, x <= 0 ? C(0) : C(1)};
    case kGelu: {
      const C cdf = C(0.5) * std::erfc(-x * C(M_SQRT1_2));
      const C pdf = std::exp(C(-0.5) * x * x) * C(0.3989422804014326779);
      return {x * cdf, cdf + x * pdf};
    }
    case kGeluTanh: {
      const C c = C(1.5957691216057307117);  // 2 sqrt(2 / pi): (1 + tanh u) / 2 is the logistic function of 2 u
      const C s = logistic(c * (x + C(0.044715) * x * x * x));
      return {x * s, s + x * s * (C(1) - s) * c * (C(1) + C(0.134145) * x * x)};
    }
    case kSilu: {
      const C s = logistic(x);
      return {x * s, s * (C(1) + x * (C(1) - s))};
    }
    case kTanh: {
      const C t = std::tanh(x);
      return {t, C(1) - t * t};
    }
    case kSigmoid: {
      const C s = logistic(x);
      return {s, s * (C(1) - s)};
    }
    case kSoftplus: {
      const C z = x * a;
      if (z > b) return {x, C(1)};
      return {(std::max(z, C(0)) + std::log1p(std::exp(-std::abs(z)))) / a, logistic(z)};
    }
    case kElu:
      return x <= 0 ? Dual<C>{a * std::expm1(x), a * std::exp(x)} : Dual<C>{x, C(1)};
    case kLeakyRelu:
      return x > 0 ? Dual<C>{x, C(1)} : Dual<C>{a * x, a};
    case kHardtanh:
      return {x <= a ? a : x >= b ? b : x, x <= a || x >= b ? C(0) : C(1)};
    default:
      return {x, C(1)};
  }
}

template <class C>
struct Job {
  int64_t function;
  C alpha, beta;
  int64_t numel, k, period;  // activity [k, period] is repeated over x
  Source<C> x, dx, activity;
  Sink<C> y, dy;
};

template <class C>
void block(const Job<C>& job, int64_t at, int64_t n) {
  C first[kBlock], second[kBlock], slope[kBlock];
  const C* x = job.x.read(at, n, first);
  C* y = job.y.place(at, second);
  for (int64_t j = 0; j < n; ++j) {
    const Dual<C> d = evaluate(job.function, job.alpha, job.beta, x[j]);
    y[j] = d.value;
    slope[j] = d.slope;
  }
  job.y.finish(at, n, y);
  for (int64_t i = 0; i < job.k; ++i) {
    const C* dx = job.dx.read(i * job.numel + at, n, first);
    const C* v = job.activity.read(i * job.period + at % job.period, n, second);
    C* dy = job.dy.place(i * job.numel + at, first);
    for (int64_t j = 0; j < n; ++j) {
      const C t = (dx ? dx[j] : C(0)) + (v ? v[j] : C(0));
      dy[j] = slope[j] == 0 ? C(0) : slope[j] * t;
    }
    job.dy.finish(i * job.numel + at, n, dy);
  }
}

template <class C>
void run(const Job<C>& job) {
  const int64_t blocks = (job.numel + kBlock - 1) / kBlock;
  const int64_t grain = std::max<int64_t>(1, kWork / (kBlock * (1 + job.k)));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t from, int64_t to) {
    const int64_t end = std::min(job.numel, to * kBlock);
    for (int64_t at = from * kBlock; at < end;) {
      int64_t n = std::min(kBlock, end - at);
      if (job.activity.given()) n = std::min(n, job.period - at % job.period);
      block(job, at, n);
      at += n;
    }
  });
}

void check_function(int64_t function, double alpha, double beta) {
  STD_TORCH_CHECK(function >= 0 && function < kFunctions, kOp, ": function is ", function, "; accepted are 0 to ",
                  kFunctions - 1);
  STD_TORCH_CHECK(function != kHardtanh || alpha <= beta, kOp, ": hardtanh has alpha (min_val) ", alpha,
                  " and beta (max_val) ", beta, "; min_val must not be larger");
}

// activity [k, *s] -> dense [k, period], repeated to at least kShortestRow elements where x is longer
Tensor prepare_activity(const Tensor& activity, const Tensor& x, int64_t k, int64_t* period) {
  check_cpu(kOp, "activity", activity);
  check_floating(kOp, "activity", activity);
  const int64_t d = activity.dim() - 1;
  bool fits = d >= 0 && d <= x.dim() && activity.size(0) == k;
  for (int64_t j = 1; fits && j <= d; ++j) fits = activity.size(-j) == x.size(-j);
  STD_TORCH_CHECK(fits, kOp, ": activity has shape ", shape_string(activity), ", expected (k, *s) with k = ", k,
                  " and s a suffix of ", shape_string(x));
  const Tensor dense = torch::stable::contiguous(activity);
  *period = std::max<int64_t>(1, dense.numel() / k);
  if (*period >= kShortestRow || *period >= x.numel()) return dense;
  const int64_t repeats = kShortestRow / *period + 1;
  const Tensor rows = torch::stable::contiguous(as_strided(dense, {k, repeats, *period}, {*period, 0, 1}, 0));
  *period *= repeats;
  return rows;
}

std::tuple<Tensor, Tensor> pointwise_jvp(const Tensor& x_, const std::optional<Tensor>& dx_,
                                         const std::optional<Tensor>& activity_, int64_t function, double alpha,
                                         double beta) {
  check_cpu(kOp, "x", x_);
  check_floating(kOp, "x", x_);
  check_function(function, alpha, beta);
  STD_TORCH_CHECK(dx_ || activity_, kOp, ": dx and activity are both None; at least one must be given");
  std::optional<Tensor> dx, activity;
  if (dx_) {
    check_cpu(kOp, "dx", *dx_);
    check_floating(kOp, "dx", *dx_);
    check_tangents(kOp, "dx", *dx_, x_);
    dx = torch::stable::contiguous(*dx_);
  }
  const Tensor& given = dx_ ? *dx_ : *activity_;
  STD_TORCH_CHECK(given.dim() >= 1, kOp, ": activity has shape (), expected (k, *s)");
  const int64_t k = given.size(0);
  check_k(kOp, k);
  int64_t period = 1;
  if (activity_) activity = prepare_activity(*activity_, x_, k, &period);
  const Tensor x = torch::stable::contiguous(x_);
  auto [y, dy] = new_dual(x, shape_of(x), k, x.scalar_type(), given.scalar_type());
  const auto go = [&, &y = y, &dy = dy](auto zero) {
    using C = decltype(zero);
    run(Job<C>{function, static_cast<C>(alpha), static_cast<C>(beta), x.numel(), k, period, Source<C>(x), Source<C>(dx),
               Source<C>(activity), Sink<C>(y), Sink<C>(dy)});
  };
  if (any_double({&x, dx ? &*dx : nullptr, activity ? &*activity : nullptr})) {
    go(double{});
  } else {
    go(float{});
  }
  return {y, dy};
}

}  // namespace

void apply_pointwise(int64_t function, double alpha, double beta, Tensor& y, Tensor& dy) {
  check_function(function, alpha, beta);
  const auto go = [&](auto zero) {
    using C = decltype(zero);
    run(Job<C>{function, static_cast<C>(alpha), static_cast<C>(beta), y.numel(), dy.size(0), 1, Source<C>(y),
               Source<C>(dy), Source<C>(), Sink<C>(y), Sink<C>(dy)});
  };
  if (y.scalar_type() == ScalarType::Double) {
    go(double{});
  } else {
    go(float{});
  }
}

namespace {
STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CPU, m) { m.impl("pointwise_jvp", TORCH_BOX(&pointwise_jvp)); }
}  // namespace

}  // namespace frog
