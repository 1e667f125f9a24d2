#include "cuda/kernels/combine_samples.cuh"
#include "cuda/kernels/gram.cuh"
#include "exported.h"

namespace {

// Calls body(T{}) by code: 0 float32, 1 float64, 2 bfloat16, 3 float16.
template <class Body>
void dispatch(int64_t code, const Body& body) {
  if (code == 0) body(float{});
  if (code == 1) body(double{});
  if (code == 2) body(frog::bf16{});
  if (code == 3) body(frog::fp16{});
}

}  // namespace

EXPORTED(sample_tangents)
(const int64_t* state, void* out, int64_t k, int64_t numel, int64_t offset, int64_t first, int64_t distribution,
 int64_t code) {
  dispatch(code, [&](auto zero) {
    frog::launch_sample(state, static_cast<decltype(zero)*>(out), k, numel, offset, first, distribution, nullptr);
  });
}

EXPORTED(tangent_combine)
(const int64_t* state, const double* coefficients, void* out, int64_t k, int64_t numel, int64_t offset, int64_t first,
 int64_t distribution, int64_t code, int64_t add, double alpha) {
  dispatch(code, [&](auto zero) {
    frog::launch_combine(state, coefficients, static_cast<decltype(zero)*>(out), k, numel, offset, first, distribution,
                         add != 0, alpha, nullptr);
  });
}

EXPORTED(tangent_combine_samples)
(const int64_t* state, const void* coefficients, void* out, int64_t k, int64_t batch, int64_t numel, int64_t offset,
 int64_t first, int64_t distribution, int64_t code) {
  dispatch(code, [&](auto zero) {
    using T = decltype(zero);
    using C = typename frog::Compute<T>::type;
    const frog::Samples<C> samples{static_cast<const C*>(coefficients), k, batch, numel};
    frog::launch_combine_samples(state, samples, static_cast<T*>(out), offset, first, distribution, nullptr);
  });
}

EXPORTED(tangent_sgd)
(const int64_t* state, const double* coefficients, void* data, void* buffer, int64_t k, int64_t numel, int64_t offset,
 int64_t first, int64_t distribution, int64_t code, int64_t nesterov, int64_t fresh, double lr, double momentum,
 double dampening, double weight_decay) {
  dispatch(code, [&](auto zero) {
    using T = decltype(zero);
    using C = typename frog::Compute<T>::type;
    const frog::SgdStep<C> step{static_cast<C>(lr),
                                static_cast<C>(momentum),
                                static_cast<C>(1 - dampening),
                                static_cast<C>(weight_decay),
                                nesterov != 0,
                                fresh != 0};
    const frog::SgdRow<T> row(static_cast<T*>(data), static_cast<T*>(buffer), numel, offset, step);
    frog::launch_sgd(state, coefficients, row, k, offset, first, distribution, nullptr);
  });
}

EXPORTED(gram)
(const void* tangents, double* work, double* gram, int64_t k, int64_t n, int64_t stride, int64_t code) {
  dispatch(code, [&](auto zero) {
    frog::launch_gram(static_cast<const decltype(zero)*>(tangents), work, gram, k, n, stride, nullptr);
  });
}

EXPORTED(tangent_gram)
(const int64_t* state, double* work, double* gram, int64_t k, int64_t numel, int64_t offset, int64_t first,
 int64_t distribution) {
  frog::launch_drawn_gram(state, work, gram, k, numel, offset, first, distribution, nullptr);
}

EXPORTED(gram_workspace)(int64_t* doubles, int64_t k, int64_t n) { *doubles = frog::gram_workspace(k, n); }
