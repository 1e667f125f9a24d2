// pointwise_jvp: y = f(x) and dy_i = f'(x) (dx_i + v_i). Value and slope are computed once for each element, a block at
// a time, and the slope is applied to all k tangents of the block while it lies in first-level cache.
#include "pointwise.h"

#include "../arguments/pointwise.h"
#include "blocks.h"

namespace frog {
namespace {

constexpr const char* kOp = "pointwise_jvp";

// codes as in POINTWISE of frog_cuda/ops/pointwise.py
constexpr int64_t kRelu = 1, kHardtanh = 10;

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
  alignas(64) C first[kBlock], second[kBlock], slope[kBlock];
  const MathKernels<C>& kernels = math<C>();
  const bool mask = job.function == kRelu || job.function == kHardtanh;
  C* y = job.y.place(at, second);
  kernels.activate(job.function, job.alpha, job.beta, job.x.read(at, n, first), n, y, slope);
  job.y.finish(at, n, y);
  for (int64_t i = 0; i < job.k; ++i) {
    const C* dx = job.dx.read(i * job.numel + at, n, first);
    const C* v = job.activity.read(i * job.period + at % job.period, n, second);
    C* dy = job.dy.place(i * job.numel + at, first);
    (mask ? kernels.apply_mask : kernels.apply_slope)(slope, dx, v, n, dy);
    job.dy.finish(i * job.numel + at, n, dy);
  }
}

template <class C>
void run(const Job<C>& job) {
  for_each_block(job.numel, job.k, [&](int64_t at, int64_t count) {
    for (const int64_t end = at + count; at < end;) {
      const int64_t row = job.activity.given() ? job.period - at % job.period : count;
      const int64_t n = std::min(row, end - at);
      block(job, at, n);
      at += n;
    }
  });
}

std::tuple<Tensor, Tensor> pointwise_jvp(const Tensor& x_, const std::optional<Tensor>& dx_,
                                         const std::optional<Tensor>& activity_, int64_t function, double alpha,
                                         double beta) {
  check_cpu(kOp, "x", x_);
  check_floating(kOp, "x", x_);
  check_function(kOp, function, alpha, beta);
  const std::optional<Tensor> dx = dense_tangents(kOp, "dx", dx_, x_);
  const int64_t k = check_given(kOp, dx_, activity_);
  const Tensor& given = dx_ ? *dx_ : *activity_;
  int64_t period = 1;
  std::optional<Tensor> activity;
  if (activity_) activity = dense_activity(kOp, "activity", *activity_, shape_of(x_), k, &period);
  const Tensor x = as_contiguous(x_);
  auto [y, dy] = new_dual(x, shape_of(x), k, x.scalar_type(), given.scalar_type());
  const auto go = [&, &y = y, &dy = dy](auto zero) {
    using C = decltype(zero);
    run(Job<C>{function, static_cast<C>(alpha), static_cast<C>(beta), x.numel(), k, period, Source<C>(x), Source<C>(dx),
               Source<C>(activity), Sink<C>(y), Sink<C>(dy)});
  };
  if (any_double({&x, pointer_to(dx), pointer_to(activity)})) {
    go(double{});
  } else {
    go(float{});
  }
  return {y, dy};
}

}  // namespace

void apply_pointwise(int64_t function, double alpha, double beta, Tensor& y, Tensor& dy) {
  check_function(kOp, function, alpha, beta);
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
