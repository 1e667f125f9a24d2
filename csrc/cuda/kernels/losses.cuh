// cross_entropy_jvp, mse_jvp and bce_jvp; csrc/cpu/losses.cpp says what is computed and why.
//
// mse and bce are elementwise: see elementwise.cuh. Cross entropy, floor: logits and dlogits are read once; what is
// written is nothing beside it. Rows that a block can hold meet it: the gradient of the loss with respect to the logits
// stays in registers and meets tangent after tangent, the next of which is being read. In longer rows the logits are
// read three times, and once more for every kTogether tangents, dlogits once.
#pragma once

#include "elementwise.cuh"
#include "rows.cuh"

namespace frog {

// ---- cross entropy

template <class X, class T>
struct CrossEntropyJob {
  using C = typename Compute<X>::type;
  const X* x;             // [rows, classes]
  const T* dx;            // [k, rows, classes]
  const int64_t* target;  // [rows]
  const C* weight;        // [classes] or null
  X* loss;                // [rows]
  T* dloss;               // [k, rows]
  RowShape shape;
  int lanes;
  int64_t numel, k, per_part, ignore_index;
  C smoothing;

  __device__ __forceinline__ C weight_of(int64_t c) const { return weight == nullptr ? C(1) : weight[c]; }
};

/// loss = -at_target log p_t - at_each sum_c w_c log p_c. A target that is no class makes it NaN: a kernel cannot
/// raise.
template <class C>
struct Smoothed {
  int64_t target;  // 0 where ignored
  C at_target, at_each;
  bool ignored;
};

template <class X, class T>
__device__ __forceinline__ Smoothed<typename Compute<X>::type> smoothed(const CrossEntropyJob<X, T>& job,
                                                                        const OwnRow& row) {
  using C = typename Compute<X>::type;
  if (row.number < 0) return {0, C(0), C(0), true};
  const int64_t t = job.target[row.number];
  if (t == job.ignore_index) return {0, C(0), C(0), true};
  const C at_each = job.smoothing / static_cast<C>(job.shape.n);
  if (t < 0 || t >= job.shape.n) return {0, C(NAN), at_each, false};
  return {t, (C(1) - job.smoothing) * job.weight_of(t), at_each, false};
}

/// Writes the loss of a row, given the sums of w log p and of w. Returns the factor of p in its gradient.
template <class X, class T, class C>
__device__ __forceinline__ C finish_loss(const CrossEntropyJob<X, T>& job, const OwnRow& row, const Group& group,
                                         const Smoothed<C>& how, C top, C lower, const double (&weighted)[2]) {
  if (row.number >= 0 && group.lane == 0 && blockIdx.y == 0) {
    C loss = C(0);
    const C x = job.shape.n > 0 ? widen(job.x[row.base + how.target]) : C(NAN);
    if (!how.ignored) loss = -how.at_target * ((x - top) - lower);
    if (!how.ignored && job.smoothing > C(0)) loss -= how.at_each * static_cast<C>(weighted[0]);
    job.loss[row.number] = narrow<X>(loss);
  }
  return how.at_target + (job.smoothing > C(0) ? how.at_each * static_cast<C>(weighted[1]) : C(0));
}

template <class X, class T, class C>
__device__ __forceinline__ C gradient_of(const CrossEntropyJob<X, T>& job, const Smoothed<C>& how, C total, C p,
                                         int64_t c) {
  C g = total * p;
  if (job.smoothing > C(0)) g -= how.at_each * job.weight_of(c);
  return c == how.target ? g - how.at_target : g;
}

template <class X, class T>
__device__ __forceinline__ void write_derivative(const CrossEntropyJob<X, T>& job, const OwnRow& row,
                                                 const Group& group, bool ignored, int64_t i, double sum) {
  if (row.number < 0 || group.lane != 0) return;
  // an ignored row's is 0 whatever the tangent, even where it is not finite
  using C = typename Compute<T>::type;
  job.dloss[i * job.shape.rows + row.number] = narrow<T>(ignored ? C(0) : static_cast<C>(sum));
}

template <bool kPacked, class X, class T>
__global__ void __launch_bounds__(kRowThreads) cross_entropy_held_kernel(CrossEntropyJob<X, T> job) {
  using C = typename Compute<X>::type;
  constexpr int N = kRowElements<kPacked, X, T>, P = kHeld<kPacked, X> / N;
  FROG_SHARED(double, shared);
  const Group group(job.lanes, 1, shared);
  const OwnRow row = own_row(job.shape, group);
  const auto address = [&](int64_t e) { return row.base + e; };
  const auto slots = [&](int q) { return row_slots<N, kPacked>(row, group, int64_t{q} * group.lanes * N); };
  const int64_t first = blockIdx.y * job.per_part, last = min(first + job.per_part, job.k);

  Values<X, N> in[P];
  Values<T, N> ahead[P];
#pragma unroll
  for (int q = 0; q < P; ++q) in[q] = read<N>(job.x, slots(q), address);
#pragma unroll
  for (int q = 0; q < P; ++q) ahead[q] = read<N>(job.dx + first * job.numel, slots(q), address);

  C g[P][N], top = C(-INFINITY);
#pragma unroll
  for (int q = 0; q < P; ++q) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      g[q][j] = slots(q).holds(j) ? widen(in[q].at(j)) : C(-INFINITY);
      top = fmax(top, g[q][j]);
    }
  }
  top = group.max(top);
  C part = 0;
#pragma unroll
  for (int q = 0; q < P; ++q) {
#pragma unroll
    for (int j = 0; j < N; ++j) part += exp(g[q][j] -= top);
  }
  double sum[1] = {static_cast<double>(part)};
  group.sum(sum);
  const C lower = log(static_cast<C>(sum[0])), factor = C(1) / static_cast<C>(sum[0]);
  double weighted[2] = {0, 0};
  if (job.smoothing > C(0)) {  // else a logit of -inf would give 0 * inf
    C logs = 0, weights = 0;
#pragma unroll
    for (int q = 0; q < P; ++q) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (!slots(q).holds(j)) continue;
        const C w = job.weight_of(slots(q).element(j));
        logs += w * (g[q][j] - lower);
        weights += w;
      }
    }
    weighted[0] = static_cast<double>(logs), weighted[1] = static_cast<double>(weights);
    group.sum(weighted);
  }
  const Smoothed<C> how = smoothed(job, row);
  const C total = finish_loss(job, row, group, how, top, lower, weighted);
#pragma unroll
  for (int q = 0; q < P; ++q) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      g[q][j] = slots(q).holds(j) ? gradient_of(job, how, total, exp(g[q][j]) * factor, slots(q).element(j)) : C(0);
    }
  }

  for (int64_t i = first; i < last; ++i) {
    C dot = 0;
#pragma unroll
    for (int q = 0; q < P; ++q) {
      const Values<T, N> dx = ahead[q];
      if (i + 1 < last) ahead[q] = read<N>(job.dx + (i + 1) * job.numel, slots(q), address);
#pragma unroll
      for (int j = 0; j < N; ++j) dot += g[q][j] * widen(dx.at(j));
    }
    double all[1] = {static_cast<double>(dot)};
    group.sum(all);
    write_derivative(job, row, group, how.ignored, i, all[0]);
  }
}

template <bool kPacked, class X, class T>
__global__ void __launch_bounds__(kRowThreads) cross_entropy_long_kernel(CrossEntropyJob<X, T> job) {
  using C = typename Compute<X>::type;
  constexpr int N = kRowElements<kPacked, X, T>, kTogether = Group::kMostValues;
  FROG_SHARED(double, shared);
  const Group group(job.lanes, 1, shared);
  const OwnRow row = own_row(job.shape, group);
  const auto address = [&](int64_t e) { return row.base + e; };
  const int64_t n = job.shape.n, share = int64_t{group.lanes} * N;
  const int64_t first = blockIdx.y * job.per_part, last = min(first + job.per_part, job.k);

  C top;
  double sum;
  softmax_statistics<N, kPacked>(job.x, row, group, address, n, &top, &sum);
  const C lower = log(static_cast<C>(sum)), factor = C(1) / static_cast<C>(sum);
  double weighted[2] = {0, 0};
  if (job.smoothing > C(0)) {
    for (int64_t from = 0; from < n; from += share) {
      const Slots<kPacked> s = row_slots<N, kPacked>(row, group, from);
      const Values<X, N> in = read<N>(job.x, s, address);
      C logs = 0, weights = 0;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (!s.holds(j)) continue;
        const C w = job.weight_of(s.element(j));
        logs += w * ((widen(in.at(j)) - top) - lower);
        weights += w;
      }
      weighted[0] += static_cast<double>(logs), weighted[1] += static_cast<double>(weights);
    }
    group.sum(weighted);
  }
  const Smoothed<C> how = smoothed(job, row);
  const C total = finish_loss(job, row, group, how, top, lower, weighted);

  for (int64_t i = first; i < last; i += kTogether) {
    double dots[kTogether] = {};
    for (int64_t from = 0; from < n; from += share) {
      const Slots<kPacked> s = row_slots<N, kPacked>(row, group, from);
      const Values<X, N> in = read<N>(job.x, s, address);
      Values<T, N> dx[kTogether] = {};
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        if (i + u < last) dx[u] = read<N>(job.dx + (i + u) * job.numel, s, address);
      }
      C g[N];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        g[j] = s.holds(j) ? gradient_of(job, how, total, exp(widen(in.at(j)) - top) * factor, s.element(j)) : C(0);
      }
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        if (i + u >= last) continue;
        C part = 0;
#pragma unroll
        for (int j = 0; j < N; ++j) part += g[j] * widen(dx[u].at(j));
        dots[u] += static_cast<double>(part);
      }
    }
    group.sum(dots);
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      if (i + u < last) write_derivative(job, row, group, how.ignored, i + u, dots[u]);
    }
  }
}

/// x [rows, classes], dx [k, rows, classes], classes >= 1; loss [rows], dloss [k, rows].
template <class X, class T>
void launch_cross_entropy(const X* x, const T* dx, const int64_t* target, const typename Compute<X>::type* weight,
                          X* loss, T* dloss, int64_t rows, int64_t classes, int64_t k, int64_t ignore_index,
                          double smoothing, cudaStream_t stream) {
  if (rows == 0) return;
  const RowShape shape = dense_rows(rows, classes);
  dispatch_rows<X, T>(shape, k, aligned16(x) && aligned16(dx), [&](auto packed, const RowLaunch& l) {
    constexpr bool kPacked = decltype(packed)::value;
    launch(l.held ? cross_entropy_held_kernel<kPacked, X, T> : cross_entropy_long_kernel<kPacked, X, T>, l.grid,
           l.block, l.shared, stream,
           CrossEntropyJob<X, T>{x, dx, target, weight, loss, dloss, shape, l.lanes, rows * classes, k, l.per_part,
                                 ignore_index, static_cast<typename Compute<X>::type>(smoothing)});
  });
}

/// Block 0 sums the losses, block 1 + i the derivatives along tangent i; for their means each block sums the weights of
/// the targets that count, too: beside the logits of a row, a loss and a target are nothing.
template <class X, class T>
__global__ void __launch_bounds__(kRowThreads)
    reduce_losses_kernel(const X* loss, const T* dloss, const int64_t* target, const typename Compute<X>::type* weight,
                         X* value, T* derivatives, int64_t rows, int64_t classes, int64_t ignore_index, bool mean) {
  FROG_SHARED(double, shared);
  const Group group(kRowThreads, 1, shared);
  const int64_t i = static_cast<int64_t>(blockIdx.x) - 1;
  double sums[2] = {0, 0};  // of the row, and of weights
  for (int64_t r = group.lane; r < rows; r += kRowThreads) {
    sums[0] += static_cast<double>(i < 0 ? widen(loss[r]) : widen(dloss[i * rows + r]));
    const int64_t t = target[r];
    if (t == ignore_index) continue;
    const bool known = t >= 0 && t < classes;  // else the loss is NaN already
    sums[1] += known && weight != nullptr ? static_cast<double>(weight[t]) : 1.0;
  }
  group.sum(sums);
  if (group.lane != 0) return;
  const double result = mean ? sums[0] / sums[1] : sums[0];
  if (i < 0) {
    *value = narrow<X>(static_cast<typename Compute<X>::type>(result));
  } else {
    derivatives[i] = narrow<T>(static_cast<typename Compute<T>::type>(result));
  }
}

/// loss, target [rows], dloss [k, rows]; value [1], derivatives [k].
template <class X, class T>
void launch_reduce_losses(const X* loss, const T* dloss, const int64_t* target, const typename Compute<X>::type* weight,
                          X* value, T* derivatives, int64_t rows, int64_t classes, int64_t k, int64_t ignore_index,
                          bool mean, cudaStream_t stream) {
  launch(reduce_losses_kernel<X, T>, dim3(static_cast<unsigned>(1 + k)), dim3(kRowThreads),
         Group::shared_bytes(kRowThreads, 1), stream, loss, dloss, target, weight, value, derivatives, rows, classes,
         ignore_index, mean);
}

// ---- elementwise losses

template <class X>
struct MsePrimal {
  const X *x, *target;

  __device__ __forceinline__ bool stops() const { return false; }
  template <int N, bool kPacked, class C>
  __device__ __forceinline__ void operator()(const Slots<kPacked>& slots, C (&loss)[N], C (&slope)[N]) const {
    C t[N];
    read_wide(x, slots, slope);
    read_wide(target, slots, t);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const C difference = slope[j] - t[j];
      loss[j] = difference * difference;
      slope[j] = C(2) * difference;
    }
  }
};

/// input, target, loss [numel]; dinput, dtarget, dloss [k, numel]; dinput or dtarget may be null.
template <class X, class T>
void launch_mse(const X* input, const X* target, const T* dinput, const T* dtarget, X* loss, T* dloss, int64_t numel,
                int64_t k, cudaStream_t stream) {
  launch_elementwise(MsePrimal<X>{input, target}, aligned16(input) && aligned16(target),
                     Tangents<T>{dinput, dtarget, max(numel, int64_t{1}), -1}, loss, dloss, numel, k, stream);
}

template <class X>
struct BcePrimal {
  const X *x, *target, *weight, *pos_weight;
  bool with_logits;

  __device__ __forceinline__ bool stops() const { return false; }
  template <int N, bool kPacked, class C>
  __device__ __forceinline__ void operator()(const Slots<kPacked>& slots, C (&loss)[N], C (&slope)[N]) const {
    C in[N], t[N], w[N], q[N];
    read_wide(x, slots, in);
    read_wide(target, slots, t);
    if (weight != nullptr) read_wide(weight, slots, w);
    if (pos_weight != nullptr) read_wide(pos_weight, slots, q);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (with_logits) {  // (1 - t) x + (1 + (q - 1) t) softplus(-x), as log p = -softplus(-x)
        const Dual<C> soft = activate<kSoftplus>(-in[j], C(1), C(INFINITY));
        const C mixed = pos_weight != nullptr ? C(1) + (q[j] - C(1)) * t[j] : C(1);
        loss[j] = (C(1) - t[j]) * in[j] + mixed * soft.value;
        slope[j] = (C(1) - t[j]) - mixed * soft.slope;
      } else {  // logarithms at least -100 and p (1 - p) at least 1e-12, a float32 at every precision, as in PyTorch
        const C p = in[j], log_p = log(p), log_q = log1p(-p), spread = p * (C(1) - p);
        const C yes = log_p < C(-100) ? C(-100) : log_p, no = log_q < C(-100) ? C(-100) : log_q;
        // no probability: NaN, since a kernel cannot raise
        slope[j] = p >= C(0) && p <= C(1) ? (p - t[j]) / (spread < C(1e-12f) ? C(1e-12f) : spread) : C(NAN);
        loss[j] = (t[j] - C(1)) * no - t[j] * yes;
      }
      if (weight != nullptr) {
        loss[j] *= w[j];
        slope[j] *= w[j];
      }
    }
  }
};

/// input, target, loss, and weight and pos_weight or null [numel]; dinput, dloss [k, numel].
template <class X, class T>
void launch_bce(const X* input, const X* target, const X* weight, const X* pos_weight, const T* dinput, X* loss,
                T* dloss, int64_t numel, int64_t k, bool with_logits, cudaStream_t stream) {
  const bool aligned = aligned16(input) && aligned16(target) && aligned16(weight) && aligned16(pos_weight);
  launch_elementwise(BcePrimal<X>{input, target, weight, pos_weight, with_logits}, aligned,
                     Tangents<T>{dinput, nullptr, 1, 1}, loss, dloss, numel, k, stream);
}

}  // namespace frog
