// tangent_sum: a + va + alpha (b + vb) for k tangents, where va and vb are activity tangents that rows share: what a
// residual connection, or an activity that nothing else takes along, does to tangents. Bound by memory: a and b are
// read and the result written once, into memory that is used again.
#include "../arguments/sum.h"
#include "blocks.h"

namespace frog {
namespace {

constexpr const char* kOp = "tangent_sum";

template <class C>
struct Job {
  int64_t numel, k;  // of a tangent
  C alpha;
  Source<C> a, va, b, vb;  // [k, numel], [k, a_period], ..
  int64_t a_period, b_period;
  Sink<C> out;
};

template <class C>
void run(const Job<C>& job) {
  torch::stable::parallel_for(0, job.k * job.numel, kWork, [&](int64_t from, int64_t to) {
    alignas(64) C first[kBlock], second[kBlock], result[kBlock];
    for (int64_t at = from; at < to;) {
      const int64_t i = at / job.numel, j = at % job.numel;
      int64_t n = std::min({kBlock, to - at, job.numel - j});
      if (job.va.given()) n = std::min(n, job.a_period - j % job.a_period);
      if (job.vb.given()) n = std::min(n, job.b_period - j % job.b_period);
      C* out = job.out.place(at, result);
      const C* a = job.a.read(at, n, first);
      if (const C* va = job.va.read(i * job.a_period + j % job.a_period, n, second)) {
        for (int64_t l = 0; l < n; ++l) out[l] = a[l] + va[l];
        a = out;
      }
      const C* b = job.b.read(at, n, second);
      if (b) {
        for (int64_t l = 0; l < n; ++l) out[l] = a[l] + job.alpha * b[l];
        a = out;
      }
      if (const C* vb = job.vb.read(i * job.b_period + j % job.b_period, n, second)) {
        for (int64_t l = 0; l < n; ++l) out[l] = a[l] + job.alpha * vb[l];
        a = out;
      }
      if (a != out) std::copy(a, a + n, out);
      job.out.finish(at, n, out);
      at += n;
    }
  });
}

Tensor tangent_sum(const Tensor& a_, const std::optional<Tensor>& va_, const std::optional<Tensor>& b_,
                   const std::optional<Tensor>& vb_, double alpha) {
  check_cpu(kOp, "a", a_);
  if (va_) check_cpu(kOp, "va", *va_);
  if (b_) check_cpu(kOp, "b", *b_);
  if (vb_) check_cpu(kOp, "vb", *vb_);
  const std::vector<int64_t> shape = check_sum(kOp, a_, va_, b_, vb_), whole = shape_of(a_);
  const int64_t k = a_.size(0);
  std::optional<Tensor> b, va, vb;
  if (b_) b = as_contiguous(*b_);
  int64_t a_period = 1, b_period = 1;
  if (va_) va = dense_activity(kOp, "va", *va_, shape, k, &a_period);
  if (vb_) vb = dense_activity(kOp, "vb", *vb_, shape, k, &b_period);
  const Tensor a = as_contiguous(a_);
  Tensor out = new_tensor(a, whole, a.scalar_type());
  const auto go = [&](auto zero) {
    using C = decltype(zero);
    run(Job<C>{a.numel() / k, k, static_cast<C>(alpha), Source<C>(a), Source<C>(va), Source<C>(b), Source<C>(vb),
               a_period, b_period, Sink<C>(out)});
  };
  if (any_double({&a, pointer_to(va), pointer_to(b), pointer_to(vb)})) {
    go(double{});
  } else {
    go(float{});
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CPU, m) { m.impl("tangent_sum", TORCH_BOX(&tangent_sum)); }

}  // namespace
}  // namespace frog
