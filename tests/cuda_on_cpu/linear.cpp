#include "cuda/kernels/linear.cuh"

#include <vector>

#include "exported.h"

namespace {

using namespace frog;

// Sampled products from x to dy, as csrc/cuda/linear.cu launches them. split: columns of a block; 0: what split_columns
// says. unpacked: x is read as it is.
template <class T>
void sampled(const T* x, const int64_t* state, const T* dbias, const T* activity,
             const typename Compute<T>::type* slope, T* dy, int64_t rows, int64_t in, int64_t out, int64_t k,
             int64_t first, int64_t distribution, int64_t offset, int64_t period, int64_t filled, int64_t stops,
             int64_t split, int64_t unpacked) {
  using C = typename Compute<T>::type;
  using E = typename RowParts<T>::E;
  const int64_t ld = packed_columns(in);
  E* packed = static_cast<E*>(aligned_alloc(128, ceil_div(RowParts<T>::kParts * rows * ld * sizeof(E) + 1, 128) * 128));
  if (unpacked && !reads_unpacked(x, in)) cuda_on_cpu::fail("x cannot be read as it is");
  if (!unpacked) launch_pack_rows<T>(x, rows, in, packed, nullptr);
  Finish<T> finish{dy, filled != 0, nullptr, nullptr, 0, dbias, activity, slope, stops != 0, k, rows, out, period};
  SampledProduct<T> p{};
  p.x = packed, p.ld = ld, p.width = ld;
  if constexpr (RowParts<T>::kParts == 1) {
    if (unpacked) p.x = x, p.ld = in, p.width = in;
  }
  p.rows = rows, p.in = in, p.out = out, p.k = k, p.state = state, p.first = first, p.offset = offset;
  p.split_columns = split ? split : split_columns<T>(rows, in, out, k);
  p.finish = finish;
  const int64_t splits = ceil_div(in, p.split_columns);
  std::vector<C> partials(splits > 1 ? splits * k * rows * out : 0);
  if (splits > 1) p.partials = partials.data();
  launch_sampled_product(p, distribution, nullptr);
  if (splits > 1) {
    finish.partials = partials.data(), finish.splits = splits;
    launch_finish(finish, nullptr);
  }
  free(packed);
}

}  // namespace

EXPORTED(add)(double* to, const double* from, int64_t n) { launch_add(to, from, n, nullptr); }

#define FROG_EXPORT(name, T)                                                                                           \
  EXPORTED(sampled_##name)                                                                                             \
  (const T* x, const int64_t* state, const T* dbias, const T* activity, const Compute<T>::type* slope, T* dy,          \
   int64_t rows, int64_t in, int64_t out, int64_t k, int64_t first, int64_t distribution, int64_t offset,              \
   int64_t period, int64_t filled, int64_t stops, int64_t split, int64_t unpacked) {                                   \
    sampled<T>(x, state, dbias, activity, slope, dy, rows, in, out, k, first, distribution, offset, period, filled,    \
               stops, split, unpacked);                                                                                \
  }                                                                                                                    \
  EXPORTED(finish_##name)                                                                                              \
  (T * dy, const T* product, const Compute<T>::type* partials, const T* dbias, const T* activity,                      \
   const Compute<T>::type* slope, int64_t filled, int64_t splits, int64_t stops, int64_t k, int64_t rows, int64_t out, \
   int64_t period) {                                                                                                   \
    launch_finish(Finish<T>{dy, filled != 0, product, partials, splits, dbias, activity, slope, stops != 0, k, rows,   \
                            out, period},                                                                              \
                  nullptr);                                                                                            \
  }                                                                                                                    \
  EXPORTED(activate_rows_##name)                                                                                       \
  (T * y, const T* bias, Compute<T>::type* slope, int64_t rows, int64_t out, int64_t function, double alpha,           \
   double beta) {                                                                                                      \
    launch_activate_rows(y, bias, rows, out, function, alpha, beta, slope, nullptr);                                   \
  }                                                                                                                    \
  EXPORTED(basis_product_##name)                                                                                       \
  (const T* x, const int64_t* coordinates, T* dy, int64_t rows, int64_t in, int64_t out, int64_t k, int64_t offset) {  \
    launch_basis_product(x, rows, in, out, coordinates, k, offset, dy, nullptr);                                       \
  }

FROG_EXPORT(float32, float)
FROG_EXPORT(float64, double)
FROG_EXPORT(bfloat16, bf16)
FROG_EXPORT(float16, fp16)
