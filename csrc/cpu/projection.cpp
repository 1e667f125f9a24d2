// Coefficients of the orthogonal projection P_U = V (V^T V)^-1 V^T g (Flügel et al., section 3.4) by pivoted Cholesky.
#include <cmath>

#include "../arguments/projection.h"
#include "pool.h"

namespace frog {
namespace {

// Factorises S G S = P L L^T P^T with S = diag(G)^-1/2, so that lengths of tangents play no part in the choice of
// pivots, then solves for r right-hand sides. a [k, k] is overwritten by L in pivot order. Returns the rank.
//
// Pivoting (Higham, "Analysis of the Cholesky decomposition of a semi-definite matrix", 1990) takes the tangent
// farthest from the span of those taken before. When none is farther than sqrt(rtol) of its length, the span is
// complete: the rest get coefficient 0 and the projection is still onto the whole span.
int64_t project(double* a, int64_t k, double rtol, const double* d, int64_t r, double* c) {
  std::vector<double> scale(k);
  std::vector<int64_t> order(k);
  for (int64_t i = 0; i < k; ++i) {
    scale[i] = a[i * k + i] > 0 ? 1.0 / std::sqrt(a[i * k + i]) : 0.0;
    order[i] = i;
  }
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < k; ++j) a[i * k + j] *= scale[i] * scale[j];
  }
  int64_t rank = 0;
  for (; rank < k; ++rank) {
    int64_t best = rank;
    for (int64_t i = rank + 1; i < k; ++i) {
      if (a[i * k + i] > a[best * k + best]) best = i;
    }
    if (!(a[best * k + best] > rtol)) break;
    if (best != rank) {  // symmetric exchange; whole rows and columns, so that L's finished part moves along
      for (int64_t j = 0; j < k; ++j) std::swap(a[rank * k + j], a[best * k + j]);
      for (int64_t j = 0; j < k; ++j) std::swap(a[j * k + rank], a[j * k + best]);
      std::swap(order[rank], order[best]);
    }
    const double pivot = std::sqrt(a[rank * k + rank]);
    a[rank * k + rank] = pivot;
    for (int64_t i = rank + 1; i < k; ++i) a[i * k + rank] /= pivot;
    for (int64_t i = rank + 1; i < k; ++i)
      a[rank * k + i] = a[i * k + rank];  // the same column, laid out for the next loop
    for (int64_t i = rank + 1; i < k; ++i) {
      const double factor = a[i * k + rank];
      const double* column = a + rank * k;
      double* row = a + i * k;
      for (int64_t j = rank + 1; j < k; ++j) row[j] -= factor * column[j];
    }
  }
  std::vector<double> y(rank * r);  // [rank, r]
  for (int64_t i = 0; i < rank; ++i) {
    double* row = y.data() + i * r;
    for (int64_t s = 0; s < r; ++s) row[s] = d[order[i] * r + s] * scale[order[i]];
    for (int64_t j = 0; j < i; ++j) {
      for (int64_t s = 0; s < r; ++s) row[s] -= a[i * k + j] * y[j * r + s];
    }
    for (int64_t s = 0; s < r; ++s) row[s] /= a[i * k + i];
  }
  for (int64_t i = rank - 1; i >= 0; --i) {
    double* row = y.data() + i * r;
    for (int64_t j = i + 1; j < rank; ++j) {
      for (int64_t s = 0; s < r; ++s) row[s] -= a[j * k + i] * y[j * r + s];
    }
    for (int64_t s = 0; s < r; ++s) row[s] /= a[i * k + i];
  }
  std::fill(c, c + k * r, 0.0);
  for (int64_t i = 0; i < rank; ++i) {
    for (int64_t s = 0; s < r; ++s) c[order[i] * r + s] = y[i * r + s] * scale[order[i]];
  }
  return rank;
}

std::tuple<Tensor, Tensor> cholesky_project(const Tensor& gram, const Tensor& derivatives, double rtol) {
  const char* op = "cholesky_project";
  check_cpu(op, "gram", gram);
  check_cpu(op, "derivatives", derivatives);
  check_projection(op, gram, derivatives, rtol);
  const bool batched = gram.dim() == 3;
  const int64_t b = batched ? gram.size(0) : 1, k = gram.size(-1), r = derivatives.size(-1);
  // a copy: it becomes the factor
  Tensor work = torch::stable::clone(as_contiguous(to_dtype(gram, ScalarType::Double)));  // [b, k, k]
  const Tensor d = as_contiguous(to_dtype(derivatives, ScalarType::Double));              // [b, k, r]
  double* g = static_cast<double*>(work.mutable_data_ptr());
  for (int64_t i = 0; i < b * k; ++i) {
    const double* row = g + i * k;
    STD_TORCH_CHECK(row[i % k] >= 0, op, ": gram has a negative or NaN diagonal entry (", row[i % k],
                    "); expected a positive semi-definite matrix");
    for (int64_t j = 0; j < k; ++j) STD_TORCH_CHECK(std::isfinite(row[j]), op, ": gram holds a NaN or infinite entry");
  }
  Tensor c = new_tensor(d, shape_of(derivatives), ScalarType::Double);  // [b, k, r]
  Tensor rank = new_tensor(d, batched ? std::vector<int64_t>{b} : std::vector<int64_t>{}, ScalarType::Long);  // [b]
  const double* rhs = static_cast<const double*>(d.const_data_ptr());
  double* out = static_cast<double*>(c.mutable_data_ptr());
  int64_t* ranks = static_cast<int64_t*>(rank.mutable_data_ptr());
  torch::stable::parallel_for(0, b, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) ranks[i] = project(g + i * k * k, k, rtol, rhs + i * k * r, r, out + i * k * r);
  });
  return {c, rank};
}

STABLE_TORCH_LIBRARY_IMPL(frog_cuda, CPU, m) { m.impl("cholesky_project", TORCH_BOX(&cholesky_project)); }

}  // namespace
}  // namespace frog
