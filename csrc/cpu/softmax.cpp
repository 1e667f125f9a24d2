// softmax_jvp and log_softmax_jvp: rows of x viewed as [outer, n, inner] are normalised over n once for all k tangents.
//   softmax:     y = exp(x - max) / sum,   dy_i = y (dx_i - sum(y dx_i))
//   log_softmax: y = x - max - log(sum),   dy_i = dx_i - sum(exp(y) dx_i)
#include <cmath>
#include <limits>

#include "blocks.h"

namespace frog {
namespace {

constexpr int64_t kWork = 16384;  // elements of primal and tangents that are worth a thread

template <class C>
struct Job {
  bool log;
  int64_t outer, n, inner, k;
  const C *x, *dx;
  C *y, *dy;
};

// One row of n elements, `inner` apart; p [n] is scratch.
template <class C>
void row(const Job<C>& job, int64_t at, std::vector<C>& p) {
  const C* x = job.x + at;
  C* y = job.y + at;
  C top = -std::numeric_limits<C>::infinity();
  for (int64_t j = 0; j < job.n; ++j) {
    const C value = x[j * job.inner];
    if (value > top || value != value) top = value;
    if (top != top) break;  // NaN: the whole row is
  }
  C sum = C(0);
  for (int64_t j = 0; j < job.n; ++j) sum += p[j] = std::exp(x[j * job.inner] - top);
  const C logarithm = std::log(sum);
  for (int64_t j = 0; j < job.n; ++j) {
    p[j] /= sum;
    y[j * job.inner] = job.log ? x[j * job.inner] - top - logarithm : p[j];
  }
  const int64_t numel = job.outer * job.n * job.inner;
  for (int64_t i = 0; i < job.k; ++i) {
    const C* dx = job.dx + i * numel + at;
    C* dy = job.dy + i * numel + at;
    C mean = C(0);
    for (int64_t j = 0; j < job.n; ++j) mean += p[j] * dx[j * job.inner];
    for (int64_t j = 0; j < job.n; ++j) {
      dy[j * job.inner] = job.log ? dx[j * job.inner] - mean : p[j] * (dx[j * job.inner] - mean);
    }
  }
}

std::tuple<Tensor, Tensor> apply(const char* op, bool log, const Tensor& x_, const Tensor& dx_, int64_t dim) {
  check_cpu(op, "x", x_);
  check_cpu(op, "dx", dx_);
  check_floating(op, "x", x_);
  check_floating(op, "dx", dx_);
  check_tangents(op, "dx", dx_, x_);
  const int64_t ndim = x_.dim();
  STD_TORCH_CHECK(ndim >= 1 && dim >= -ndim && dim < ndim, op, ": dim is ", dim,
                  "; expected an axis of x, which has shape ", shape_string(x_));
  if (dim < 0) dim += ndim;
  int64_t outer = 1, inner = 1;
  for (int64_t j = 0; j < dim; ++j) outer *= x_.size(j);
  for (int64_t j = dim + 1; j < ndim; ++j) inner *= x_.size(j);
  const int64_t k = dx_.size(0), n = x_.size(dim);
  const ScalarType compute = any_double({&x_, &dx_}) ? ScalarType::Double : ScalarType::Float;
  const Tensor x = torch::stable::contiguous(to_dtype(x_, compute));
  const Tensor dx = torch::stable::contiguous(to_dtype(dx_, compute));
  auto [y, dy] = new_dual(x, shape_of(x_), k, compute, compute);
  const auto go = [&, &y = y, &dy = dy](auto zero) {
    using C = decltype(zero);
    const Job<C> job{log,
                     outer,
                     n,
                     inner,
                     k,
                     static_cast<const C*>(x.const_data_ptr()),
                     static_cast<const C*>(dx.const_data_ptr()),
                     static_cast<C*>(y.mutable_data_ptr()),
                     static_cast<C*>(dy.mutable_data_ptr())};
    const int64_t grain = std::max<int64_t>(1, kWork / std::max<int64_t>(1, n * (1 + k)));
    torch::stable::parallel_for(0, outer * inner, grain, [&](int64_t from, int64_t to) {
      std::vector<C> p(n);
      for (int64_t r = from; r < to; ++r) row(job, r / inner * n * inner + r % inner, p);
    });
  };
  if (compute == ScalarType::Double) {
    go(double{});
  } else {
    go(float{});
  }
  return {to_dtype(y, x_.scalar_type()), to_dtype(dy, dx_.scalar_type())};
}

std::tuple<Tensor, Tensor> softmax_jvp(const Tensor& x, const Tensor& dx, int64_t dim) {
  return apply("softmax_jvp", false, x, dx, dim);
}
std::tuple<Tensor, Tensor> log_softmax_jvp(const Tensor& x, const Tensor& dx, int64_t dim) {
  return apply("log_softmax_jvp", true, x, dx, dim);
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CPU, m) {
  m.impl("softmax_jvp", TORCH_BOX(&softmax_jvp));
  m.impl("log_softmax_jvp", TORCH_BOX(&log_softmax_jvp));
}

}  // namespace
}  // namespace frog
