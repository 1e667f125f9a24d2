// What linear_jvp does to the products: bias and activation of y, and for the tangents the addition of what they are
// made of and the multiplication with the slope. Bound by memory traffic: y is read and written once, a slope is
// written for each of its elements and read once for kTangents tangents; each part of a tangent is read once. Where
// sampled products write dy themselves (linear.cuh), they do this last step as well and dy moves once.
#pragma once

#include "activation.cuh"
#include "types.cuh"

namespace frog {

/// Where dy [k, rows, out] = slope * (sum + what is there + product + bias tangent + activity tangent) comes from; null
/// pointers stand for what is not given.
template <class T>
struct Finish {
  using C = typename Compute<T>::type;
  T* dy;
  bool filled;        // dy holds products with the incoming tangents
  const T* product;   // [k, rows, out]: products with supplied weight tangents or their factors
  const C* partials;  // [splits, k, rows, out]: products with sampled ones
  int64_t splits;
  const T* dbias;     // [k, out]
  const T* activity;  // [k, period, out]: row r takes row r % period
  const C* slope;     // [rows, out]
  bool stops;         // a slope of 0 gives 0 whatever the tangent
  int64_t k, rows, out, period;

  /// Whether N neighbouring elements can be read and written at once, everywhere.
  template <int N>
  bool packs() const {
    const auto aligned = [](const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
    return out % N == 0 && aligned(dy, N * sizeof(T)) && aligned(product, N * sizeof(T)) &&
           aligned(dbias, N * sizeof(T)) && aligned(activity, N * sizeof(T)) &&
           aligned(partials, std::min<size_t>(16, N * sizeof(C))) &&
           aligned(slope, std::min<size_t>(16, N * sizeof(C)));
  }

  /// v[j] += from[j].
  template <int N, class S>
  __device__ static __forceinline__ void add(const S* from, C (&v)[N]) {
    constexpr int kAtOnce = N < kPack<S> ? N : kPack<S>;
#pragma unroll
    for (int j = 0; j < N; j += kAtOnce) {
      const Pack<S, kAtOnce> pack = *reinterpret_cast<const Pack<S, kAtOnce>*>(from + j);
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) v[j + e] += widen(pack.at[e]);
    }
  }

  /// Adds what tangent i has at row r, columns c .. c + N, to the sums v.
  template <int N>
  __device__ __forceinline__ void gather(int64_t i, int64_t r, int64_t c, C (&v)[N]) const {
    const int64_t at = (i * rows + r) * out + c;
    for (int64_t s = 0; s < splits; ++s) add(partials + s * k * rows * out + at, v);
    if (filled) add(dy + at, v);
    if (product != nullptr) add(product + at, v);
    if (dbias != nullptr) add(dbias + i * out + c, v);
    if (activity != nullptr) {
      const int64_t row = period == 1 ? 0 : period == rows ? r : r % period;
      add(activity + (i * period + row) * out + c, v);
    }
  }

  template <int N>
  __device__ __forceinline__ void read_slope(int64_t r, int64_t c, C (&s)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) s[j] = slope != nullptr ? C(0) : C(1);
    if (slope != nullptr) add(slope + r * out + c, s);
  }

  template <int N>
  __device__ __forceinline__ void write(int64_t i, int64_t r, int64_t c, const C (&v)[N], const C (&s)[N]) const {
    Pack<T, N> pack;
#pragma unroll
    for (int j = 0; j < N; ++j) pack.at[j] = narrow<T>(slope != nullptr ? apply_slope(stops, s[j], v[j]) : v[j]);
    *reinterpret_cast<Pack<T, N>*>(dy + (i * rows + r) * out + c) = pack;
  }

  /// The whole step for N sums that are already there.
  template <int N>
  __device__ __forceinline__ void store(int64_t i, int64_t r, int64_t c, C (&v)[N]) const {
    C s[N];
    read_slope(r, c, s);
    gather(i, r, c, v);
    write(i, r, c, v, s);
  }
};

constexpr int kFinishThreads = 256;
constexpr int kFinishTangents = 4;  // of a thread, whose loads are in flight together and share the slope

// grid (vectors of [rows, out], groups of tangents)
template <class T, int N>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const Finish<T> p) {
  using C = typename Compute<T>::type;
  const int64_t vectors = p.out / N, at = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (at >= p.rows * vectors) return;
  const int64_t r = at / vectors, c = at % vectors * N, first = static_cast<int64_t>(blockIdx.y) * kFinishTangents;
  C s[N], v[kFinishTangents][N] = {};
  p.read_slope(r, c, s);
#pragma unroll
  for (int j = 0; j < kFinishTangents; ++j) {
    if (first + j < p.k) p.gather(first + j, r, c, v[j]);
  }
#pragma unroll
  for (int j = 0; j < kFinishTangents; ++j) {
    if (first + j < p.k) p.write(first + j, r, c, v[j], s);
  }
}

/// dy from its parts; k at most 4 * 65535.
template <class T>
void launch_finish(const Finish<T>& p, cudaStream_t stream) {
  if (p.rows == 0 || p.out == 0) return;
  const auto go = [&](auto kernel, int64_t n) {
    const dim3 grid(ceil_div(p.rows * (p.out / n), kFinishThreads), ceil_div(p.k, kFinishTangents));
    launch(kernel, grid, dim3(kFinishThreads), 0, stream, p);
  };
  if (p.template packs<kPack<T>>()) {
    go(finish_kernel<T, kPack<T>>, kPack<T>);
  } else {
    go(finish_kernel<T, 1>, 1);
  }
}

// ---- y

// y [rows, out] += bias [out], or null, and through the activation; slope [rows, out] or null
template <class T, class S, int N>
__global__ void __launch_bounds__(kFinishThreads)
    activate_rows_kernel(T* __restrict__ y, const T* __restrict__ bias, int64_t rows, int64_t out, int function,
                         double alpha, double beta, S* __restrict__ slope) {
  using C = typename Compute<T>::type;
  const int64_t vectors = out / N, at = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (at >= rows * vectors) return;
  const int64_t c = at % vectors * N;
  C x[N] = {}, value[N], steep[N];
  Finish<T>::add(y + at * N, x);
  if (bias != nullptr) Finish<T>::add(bias + c, x);
  activate<N>(function, static_cast<C>(alpha), static_cast<C>(beta), x, value, steep);
  Pack<T, N> pack;
#pragma unroll
  for (int j = 0; j < N; ++j) pack.at[j] = narrow<T>(value[j]);
  *reinterpret_cast<Pack<T, N>*>(y + at * N) = pack;
  if (slope == nullptr) return;
  constexpr int kAtOnce = N < kPack<S> ? N : kPack<S>;
#pragma unroll
  for (int j = 0; j < N; j += kAtOnce) {
    Pack<S, kAtOnce> slopes;
#pragma unroll
    for (int e = 0; e < kAtOnce; ++e) slopes.at[e] = static_cast<S>(steep[j + e]);
    *reinterpret_cast<Pack<S, kAtOnce>*>(slope + at * N + j) = slopes;
  }
}

/// S: the type that tangents are computed in. function, alpha and beta as in POINTWISE of frog_cuda/ops/pointwise.py.
template <class T, class S>
void launch_activate_rows(T* y, const T* bias, int64_t rows, int64_t out, int64_t function, double alpha, double beta,
                          S* slope, cudaStream_t stream) {
  if (rows == 0 || out == 0) return;
  const auto go = [&](auto kernel, int64_t n) {
    launch(kernel, dim3(ceil_div(rows * (out / n), kFinishThreads)), dim3(kFinishThreads), 0, stream, y, bias, rows,
           out, function, alpha, beta, slope);
  };
  if (out % kPack<T> == 0 && aligned16(y) && aligned16(bias) && aligned16(slope)) {
    go(activate_rows_kernel<T, S, kPack<T>>, kPack<T>);
  } else {
    go(activate_rows_kernel<T, S, 1>, 1);
  }
}

// ---- standard basis

// dy [k, rows, out]: tangent i is 1 at one coordinate of the global vector. Where that is element (o, c) of the weight
// [out, in], row r of tangent i gains x [rows, in] at (r, c) in column o; the rest is untouched. A kernel cannot raise:
// a negative coordinate makes its tangent NaN.
template <class T>
__global__ void __launch_bounds__(kFinishThreads)
    basis_product_kernel(const T* __restrict__ x, int64_t rows, int64_t in, int64_t out,
                         const int64_t* __restrict__ coordinates, int64_t offset, T* __restrict__ dy) {
  const int64_t r = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x, i = blockIdx.y;
  if (r >= rows) return;
  T* const row = dy + (i * rows + r) * out;
  if (coordinates[i] < 0) {
    for (int64_t c = 0; c < out; ++c) row[c] = narrow<T>(static_cast<typename Compute<T>::type>(NAN));
    return;
  }
  const int64_t at = coordinates[i] - offset;
  if (at < 0 || at >= out * in) return;
  row[at / in] = narrow<T>(widen(row[at / in]) + widen(x[r * in + at % in]));
}

/// coordinates [k]; k at most 65535.
template <class T>
void launch_basis_product(const T* x, int64_t rows, int64_t in, int64_t out, const int64_t* coordinates, int64_t k,
                          int64_t offset, T* dy, cudaStream_t stream) {
  if (rows == 0 || in == 0 || out == 0) return;
  launch(basis_product_kernel<T>, dim3(ceil_div(rows, kFinishThreads), k), dim3(kFinishThreads), 0, stream, x, rows, in,
         out, coordinates, offset, dy);
}

// ---- Gram matrices of weight and bias

// A template, as every kernel of a file that several .cu files include: only those may be defined more than once.
template <class T>
__global__ void __launch_bounds__(kFinishThreads)
    add_kernel(T* __restrict__ to, const T* __restrict__ from, int64_t n) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (at < n) to[at] += from[at];
}

/// to [n] += from [n], n >= 1.
inline void launch_add(double* to, const double* from, int64_t n, cudaStream_t stream) {
  launch(add_kernel<double>, dim3(ceil_div(n, kFinishThreads)), dim3(kFinishThreads), 0, stream, to, from, n);
}

}  // namespace frog
