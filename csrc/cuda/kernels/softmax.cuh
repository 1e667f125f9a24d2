// softmax_jvp and log_softmax_jvp: p = softmax(x), dy_i = p (dx_i - sum(p dx_i)) or, for the logarithm, without the
// factor p.
//
// Floor: x and dx are read once, y and dy written once. Rows of up to kRowThreads * kHeld elements meet it: x becomes p
// in registers, and a tangent stays there between its sum and its result while the next one is read. Longer rows are
// read three times, and twice for each tangent; kTogether tangents share a pass, so that x, whose exponential is taken
// again, costs little.
#pragma once

#include "rows.cuh"

namespace frog {

template <class X, class T>
struct SoftmaxJob {
  const X* x;
  const T* dx;
  X* y;
  T* dy;
  RowShape shape;
  int lanes, across;
  int64_t numel, k, per_part;
  bool log;
};

template <bool kPacked, class X, class T>
__global__ void __launch_bounds__(kRowThreads) softmax_held_kernel(SoftmaxJob<X, T> job) {
  using C = typename Compute<X>::type;
  constexpr int N = kRowElements<kPacked, X, T>, P = kHeld<kPacked, X> / N;
  FROG_SHARED(double, shared);
  const Group group(job.lanes, job.across, shared);
  const OwnRow row = own_row(job.shape, group);
  const auto address = [&](int64_t e) { return row.base + job.shape.offset(e); };
  const auto slots = [&](int q) { return row_slots<N, kPacked>(row, group, int64_t{q} * group.lanes * N); };
  const int64_t first = blockIdx.y * job.per_part, last = min(first + job.per_part, job.k);

  Values<X, N> in[P];
  Values<T, N> ahead[P];
#pragma unroll
  for (int q = 0; q < P; ++q) in[q] = read<N>(job.x, slots(q), address);
#pragma unroll
  for (int q = 0; q < P; ++q) ahead[q] = read<N>(job.dx + first * job.numel, slots(q), address);

  C p[P][N], top = C(-INFINITY);
#pragma unroll
  for (int q = 0; q < P; ++q) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      p[q][j] = slots(q).holds(j) ? widen(in[q].at(j)) : C(-INFINITY);
      top = fmax(top, p[q][j]);
    }
  }
  top = group.max(top);
  C part = 0;
#pragma unroll
  for (int q = 0; q < P; ++q) {
#pragma unroll
    for (int j = 0; j < N; ++j) part += exp(p[q][j] -= top);
  }
  double total[1] = {static_cast<double>(part)};
  group.sum(total);
  const C lower = log(static_cast<C>(total[0])), factor = C(1) / static_cast<C>(total[0]);
#pragma unroll
  for (int q = 0; q < P; ++q) {
    Values<X, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const C logarithm = p[q][j] - lower;
      p[q][j] = exp(p[q][j]) * factor;
      out.at(j) = narrow<X>(job.log ? logarithm : p[q][j]);
    }
    if (blockIdx.y == 0) write<N>(job.y, slots(q), address, out);
  }

  for (int64_t i = first; i < last; ++i) {
    Values<T, N> dx[P];
#pragma unroll
    for (int q = 0; q < P; ++q) {
      dx[q] = ahead[q];
      if (i + 1 < last) ahead[q] = read<N>(job.dx + (i + 1) * job.numel, slots(q), address);
    }
    C dot = 0;
#pragma unroll
    for (int q = 0; q < P; ++q) {
#pragma unroll
      for (int j = 0; j < N; ++j) dot += p[q][j] * widen(dx[q].at(j));
    }
    double mean[1] = {static_cast<double>(dot)};
    group.sum(mean);
    const C shift = static_cast<C>(mean[0]);
#pragma unroll
    for (int q = 0; q < P; ++q) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const C moved = widen(dx[q].at(j)) - shift;
        dx[q].at(j) = narrow<T>(job.log ? moved : p[q][j] * moved);
      }
      write<N>(job.dy + i * job.numel, slots(q), address, dx[q]);
    }
  }
}

template <bool kPacked, class X, class T>
__global__ void __launch_bounds__(kRowThreads) softmax_long_kernel(SoftmaxJob<X, T> job) {
  using C = typename Compute<X>::type;
  constexpr int N = kRowElements<kPacked, X, T>, kTogether = Group::kMostValues;
  FROG_SHARED(double, shared);
  const Group group(job.lanes, job.across, shared);
  const OwnRow row = own_row(job.shape, group);
  const auto address = [&](int64_t e) { return row.base + job.shape.offset(e); };
  const int64_t n = job.shape.n, share = int64_t{group.lanes} * N;
  const int64_t first = blockIdx.y * job.per_part, last = min(first + job.per_part, job.k);

  C top;
  double sum;
  softmax_statistics<N, kPacked>(job.x, row, group, address, n, &top, &sum);
  const C lower = log(static_cast<C>(sum)), factor = C(1) / static_cast<C>(sum);
  if (blockIdx.y == 0) {
    for_each_share<N, kPacked>(job.x, row, group, address, n, [&](const Slots<kPacked>& s, const Values<X, N>& in) {
      Values<X, N> y;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const C low = widen(in.at(j)) - top;
        y.at(j) = narrow<X>(job.log ? low - lower : exp(low) * factor);
      }
      write<N>(job.y, s, address, y);
    });
  }
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
      C p[N];
#pragma unroll
      for (int j = 0; j < N; ++j) p[j] = s.holds(j) ? exp(widen(in.at(j)) - top) * factor : C(0);
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        if (i + u >= last) continue;
        C part = 0;
#pragma unroll
        for (int j = 0; j < N; ++j) part += p[j] * widen(dx[u].at(j));
        dots[u] += static_cast<double>(part);
      }
    }
    group.sum(dots);
    for (int64_t from = 0; from < n; from += share) {
      const Slots<kPacked> s = row_slots<N, kPacked>(row, group, from);
      const Values<X, N> in = read<N>(job.x, s, address);
      Values<T, N> dx[kTogether] = {};
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        if (i + u < last) dx[u] = read<N>(job.dx + (i + u) * job.numel, s, address);
      }
      C p[N];
#pragma unroll
      for (int j = 0; j < N; ++j) p[j] = job.log ? C(1) : exp(widen(in.at(j)) - top) * factor;
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        if (i + u >= last) continue;
#pragma unroll
        for (int j = 0; j < N; ++j) {
          dx[u].at(j) = narrow<T>(p[j] * (widen(dx[u].at(j)) - static_cast<C>(dots[u])));
        }
        write<N>(job.dy + (i + u) * job.numel, s, address, dx[u]);
      }
    }
  }
}

/// x, y [outer, n, inner]; dx, dy [k, outer, n, inner]; the softmax is over n.
template <class X, class T>
void launch_softmax(const X* x, const T* dx, X* y, T* dy, int64_t outer, int64_t n, int64_t inner, int64_t k, bool log,
                    cudaStream_t stream) {
  const int64_t numel = outer * n * inner;
  if (numel == 0) return;
  const RowShape shape = strided_rows(outer, n, inner);
  const bool aligned = aligned16(x) && aligned16(dx) && aligned16(y) && aligned16(dy);
  dispatch_rows<X, T>(shape, k, aligned, [&](auto packed, const RowLaunch& l) {
    constexpr bool kPacked = decltype(packed)::value;
    launch(l.held ? softmax_held_kernel<kPacked, X, T> : softmax_long_kernel<kPacked, X, T>, l.grid, l.block, l.shared,
           stream, SoftmaxJob<X, T>{x, dx, y, dy, shape, l.lanes, l.across, numel, k, l.per_part, log});
  });
}

}  // namespace frog
