#include "cuda/kernels/projection.cuh"

#include "exported.h"

namespace {

frog::ProjectionPlan plan_of(int64_t k) { return frog::projection_plan(k, frog::shared_memory_of_device()); }

}  // namespace

EXPORTED(projection_plan)(int64_t* plan, int64_t k) {
  const frog::ProjectionPlan p = plan_of(k);
  plan[0] = p.matrix_shared;
  plan[1] = p.solvers;
  plan[2] = p.bytes;
}

EXPORTED(cholesky_project)
(const double* gram, const double* derivatives, double* work, double* coefficients, int64_t* rank, int64_t b, int64_t k,
 int64_t r, double rtol) {
  frog::launch_projection(plan_of(k), gram, derivatives, rtol, work, coefficients, rank, b, k, r, nullptr);
}
