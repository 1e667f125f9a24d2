// softmax_jvp and log_softmax_jvp. A row of x is read once, its probabilities stay in cache for all k tangents. Rows
// that do not lie densely, because the softmax is not over the last axis or the dtype is low, are collected in tiles.
#include <cmath>

#include "blocks.h"

namespace frog {
namespace {

constexpr int64_t kTileElements = 32768;  // of one tile of rows; three tiles stay in second-level cache

template <class C>
struct Job {
  bool log;
  int64_t outer, classes, inner, k;  // x [outer, classes, inner], dx [k, outer, classes, inner]
  Source<C> x, dx;
  Sink<C> y, dy;
};

// x [classes] -> p = softmax(x) and y; y may be p where the logarithm is not asked for
template <class C>
void forward(const Job<C>& job, const C* x, C* p, C* y) {
  C shift;
  const C sum = math<C>().softmax(x, job.classes, p, &shift);
  if (job.log) {
    const C lower = std::log(sum);
    for (int64_t c = 0; c < job.classes; ++c) y[c] = (x[c] - shift) - lower;
  }
}

template <class C>
void tangents(const Job<C>& job, const C* p, const C* dx, int64_t k, int64_t ld, C* dy) {
  (job.log ? math<C>().log_softmax_tangents : math<C>().softmax_tangents)(p, dx, job.classes, k, ld, dy);
}

// inner = 1: rows are dense
template <class C>
void rows(const Job<C>& job, int64_t from, int64_t to) {
  const int64_t n = job.classes, ld = job.outer * n;
  std::vector<C> first(n), second(n), third(job.log ? n : 0);
  for (int64_t r = from; r < to; ++r) {
    C* y = job.y.place(r * n, second.data());
    C* p = job.log ? third.data() : y;
    forward(job, job.x.read(r * n, n, first.data()), p, y);
    if (job.dx.direct() && job.dy.direct()) {
      job.y.finish(r * n, n, y);
      tangents(job, p, job.dx.read(r * n, n, nullptr), job.k, ld, job.dy.place(r * n, nullptr));
      continue;
    }
    for (int64_t i = 0; i < job.k; ++i) {
      const C* dx = job.dx.read(i * ld + r * n, n, first.data());
      C* dy = job.dy.place(i * ld + r * n, first.data());
      tangents(job, p, dx, 1, n, dy);
      job.dy.finish(i * ld + r * n, n, dy);
    }
    job.y.finish(r * n, n, y);
  }
}

// inner > 1: columns first .. first + width of one [classes, inner] matrix, collected as rows of a tile [width,
// classes]
template <class C>
class Tile {
 public:
  Tile(const Job<C>& job, int64_t width)
      : job_(job), run_(width), p_(width * job.classes), in_(width * job.classes), out_(width * job.classes) {}

  void work(int64_t matrix, int64_t first, int64_t width) {
    const int64_t n = job_.classes, stride = job_.outer * n * job_.inner, at = matrix * n * job_.inner + first;
    C* y = job_.log ? out_.data() : p_.data();
    collect(job_.x, at, width);
    for (int64_t l = 0; l < width; ++l) forward(job_, in_.data() + l * n, p_.data() + l * n, y + l * n);
    spread(y, job_.y, at, width);
    for (int64_t i = 0; i < job_.k; ++i) {
      collect(job_.dx, i * stride + at, width);
      for (int64_t l = 0; l < width; ++l) {
        tangents(job_, p_.data() + l * n, in_.data() + l * n, 1, n, out_.data() + l * n);
      }
      spread(out_.data(), job_.dy, i * stride + at, width);
    }
  }

 private:
  void collect(const Source<C>& source, int64_t at, int64_t width) {
    for (int64_t c = 0; c < job_.classes; ++c) {
      const C* run = source.read(at + c * job_.inner, width, run_.data());
      for (int64_t l = 0; l < width; ++l) in_[l * job_.classes + c] = run[l];
    }
  }
  void spread(const C* rows, const Sink<C>& sink, int64_t at, int64_t width) {
    for (int64_t c = 0; c < job_.classes; ++c) {
      C* run = sink.place(at + c * job_.inner, run_.data());
      for (int64_t l = 0; l < width; ++l) run[l] = rows[l * job_.classes + c];
      sink.finish(at + c * job_.inner, width, run);
    }
  }

  const Job<C>& job_;
  std::vector<C> run_, p_, in_, out_;
};

template <class C>
void run(const Job<C>& job) {
  if (job.outer * job.classes * job.inner == 0) return;
  const int64_t width =
      job.inner == 1 ? 1 : std::min(job.inner, std::clamp<int64_t>(kTileElements / job.classes, 8, 64));
  const int64_t across = (job.inner + width - 1) / width;
  const int64_t grain = std::max<int64_t>(1, kWork / (width * job.classes * (1 + job.k)));
  torch::stable::parallel_for(0, job.outer * across, grain, [&](int64_t from, int64_t to) {
    if (job.inner == 1) return rows(job, from, to);
    Tile<C> tile(job, width);
    for (int64_t t = from; t < to; ++t) {
      const int64_t first = t % across * width;
      tile.work(t / across, first, std::min(width, job.inner - first));
    }
  });
}

std::tuple<Tensor, Tensor> softmax_of(const char* op, bool log, const Tensor& x_, const Tensor& dx_, int64_t dim) {
  check_cpu(op, "x", x_);
  check_floating(op, "x", x_);
  const Tensor dx = *dense_tangents(op, "dx", dx_, x_);
  const int64_t axes = std::max<int64_t>(1, x_.dim());
  STD_TORCH_CHECK(dim >= -axes && dim < axes, op, ": dim is ", dim, "; accepted for x of shape ", shape_string(x_),
                  " are ", -axes, " to ", axes - 1);
  const Tensor x = torch::stable::contiguous(x_);
  const int64_t axis = dim < 0 ? dim + axes : dim;
  int64_t outer = 1, inner = 1;
  for (int64_t j = 0; j < axis; ++j) outer *= x.size(j);
  for (int64_t j = axis + 1; j < x.dim(); ++j) inner *= x.size(j);
  const int64_t classes = x.dim() > 0 ? x.size(axis) : 1, k = dx.size(0);
  auto [y, dy] = new_dual(x, shape_of(x), k, x.scalar_type(), dx.scalar_type());
  const auto go = [&, &y = y, &dy = dy](auto zero) {
    using C = decltype(zero);
    run(Job<C>{log, outer, classes, inner, k, Source<C>(x), Source<C>(dx), Sink<C>(y), Sink<C>(dy)});
  };
  if (any_double({&x, &dx})) {
    go(double{});
  } else {
    go(float{});
  }
  return {y, dy};
}

std::tuple<Tensor, Tensor> softmax_jvp(const Tensor& x, const Tensor& dx, int64_t dim) {
  return softmax_of("softmax_jvp", false, x, dx, dim);
}
std::tuple<Tensor, Tensor> log_softmax_jvp(const Tensor& x, const Tensor& dx, int64_t dim) {
  return softmax_of("log_softmax_jvp", true, x, dx, dim);
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CPU, m) {
  m.impl("softmax_jvp", TORCH_BOX(&softmax_jvp));
  m.impl("log_softmax_jvp", TORCH_BOX(&log_softmax_jvp));
}

}  // namespace
}  // namespace frog
