#include "cuda/kernels/projection.cuh"

#include "exported.h"

EXPORTED(cholesky_project)
(const double* gram, const double* derivatives, double* work, double* coefficients, int64_t* rank, int64_t b, int64_t k,
 int64_t r, double rtol) {
  frog::launch_projection(gram, derivatives, rtol, work, coefficients, rank, b, k, r, nullptr);
}
