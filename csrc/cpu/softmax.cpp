// softmax_jvp and log_softmax_jvp. A block of rows of x is read once, its probabilities stay in cache for all k
// tangents. Rows that do not lie densely, because the softmax is not over the last axis, are collected in a tile first.
#include <cmath>

#include "../arguments/softmax.h"
#include "blocks.h"

namespace frog {
namespace {

constexpr int64_t kTileElements = 32768;  // three tiles stay in second-level cache

template <class C>
struct Job {
  bool log;
  int64_t outer, classes, inner, k;  // x [outer, classes, inner], dx [k, outer, classes, inner]
  Source<C> x, dx;
  Sink<C> y, dy;
};

// x [rows, classes] -> p = softmax(x) and y; y may be p where the logarithm is not asked for
template <class C>
void forward(const Job<C>& job, const C* x, int64_t rows, C* p, C* y) {
  for (int64_t at = 0; at < rows * job.classes; at += job.classes) {
    C shift;
    const C sum = math<C>().softmax(x + at, job.classes, p + at, &shift);
    if (!job.log) continue;
    const C lower = std::log(sum);
    for (int64_t c = at; c < at + job.classes; ++c) y[c] = (x[c] - shift) - lower;
  }
}

template <class C>
void tangents(const Job<C>& job, const C* p, const C* dx, int64_t rows, C* dy) {
  (job.log ? math<C>().log_softmax_tangents : math<C>().softmax_tangents)(p, dx, job.classes, rows, dy);
}

// Blocks of dense rows, or of columns of a matrix [classes, inner].
template <class C>
class Block {
 public:
  Block(const Job<C>& job, int64_t rows)
      : job_(job), run_(rows), p_(rows * job.classes), in_(rows * job.classes), out_(rows * job.classes) {}

  // inner = 1: rows first .. first + rows
  void dense(int64_t first, int64_t rows) {
    const int64_t n = rows * job_.classes, at = first * job_.classes, stride = job_.outer * job_.classes;
    C* y = job_.y.place(at, out_.data());
    C* p = job_.log ? p_.data() : y;
    forward(job_, job_.x.read(at, n, in_.data()), rows, p, y);
    job_.y.finish(at, n, y);
    if (p == out_.data()) p_.swap(out_);
    for (int64_t i = 0; i < job_.k; ++i) {
      C* dy = job_.dy.place(i * stride + at, out_.data());
      tangents(job_, p, job_.dx.read(i * stride + at, n, in_.data()), rows, dy);
      job_.dy.finish(i * stride + at, n, dy);
    }
  }

  // columns first .. first + width of one matrix become rows of a tile [width, classes]
  void strided(int64_t matrix, int64_t first, int64_t width) {
    const int64_t stride = job_.outer * job_.classes * job_.inner, at = matrix * job_.classes * job_.inner + first;
    C* y = job_.log ? out_.data() : p_.data();
    collect(job_.x, at, width);
    forward(job_, in_.data(), width, p_.data(), y);
    spread(y, job_.y, at, width);
    for (int64_t i = 0; i < job_.k; ++i) {
      collect(job_.dx, i * stride + at, width);
      tangents(job_, p_.data(), in_.data(), width, out_.data());
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
  const bool dense = job.inner == 1;
  // wide enough for whole cache lines of a strided axis
  const int64_t most =
      dense ? std::max<int64_t>(1, kBlock / job.classes) : std::clamp<int64_t>(kTileElements / job.classes, 8, 64);
  const int64_t length = dense ? job.outer : job.inner;  // is cut into blocks of `rows`
  const int64_t rows = std::min(length, most), across = (length + rows - 1) / rows;
  const int64_t grain = std::max<int64_t>(1, kWork / (rows * job.classes * (1 + job.k)));
  torch::stable::parallel_for(0, dense ? across : job.outer * across, grain, [&](int64_t from, int64_t to) {
    Block<C> block(job, rows);
    for (int64_t b = from; b < to; ++b) {
      const int64_t first = b % across * rows, count = std::min(rows, length - first);
      if (dense) {
        block.dense(first, count);
      } else {
        block.strided(b / across, first, count);
      }
    }
  });
}

std::tuple<Tensor, Tensor> softmax_of(const char* op, bool log, const Tensor& x_, const Tensor& dx_, int64_t dim) {
  check_cpu(op, "x", x_);
  check_floating(op, "x", x_);
  const Tensor dx = *dense_tangents(op, "dx", dx_, x_);
  const auto [outer, classes, inner] = check_softmax(op, x_, dim);
  const Tensor x = as_contiguous(x_);
  const int64_t k = dx.size(0);
  auto [y, dy] = new_dual(x, shape_of(x), k, x.scalar_type(), dx.scalar_type());
  const auto go = [&, &y = y, &dy = dy, outer = outer, classes = classes, inner = inner](auto zero) {
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
