// normalization_jvp: with x^ = (x - mean) r and r = 1 / sqrt(var + eps),
//   y  = w x^ + b
//   dy = w r (dx - mean(dx) - x^ mean(dx x^)) + dw x^ + db
// csrc/cpu/normalization.cpp says which normalisations these are.
//
// Floor: x and dx are read once, y and dy written once. Groups of up to kRowThreads * kHeld elements meet it: x^ stays
// in registers for all tangents, and a tangent between its sums and its result, while the next one is read. Longer
// groups read x three times, each tangent twice, and x twice more for every kTogether tangents. A group is the work of
// one block: few long groups and few tangents leave part of the device idle.
#pragma once

#include "rows.cuh"

namespace frog {

/// How many factors (weight, bias and their tangents) a group has.
enum class Factors { kOne, kEach, kRuns };

template <class X, class T>
struct NormalizationJob {
  using C = typename Compute<X>::type;
  const X* x;
  const T* dx;  // [k, numel] or null
  X* y;
  T* dy;
  const C *weight, *dweight, *bias, *dbias;  // [weight_groups, weight_inner], tangents [k, ...], or null
  const C *given_mean, *given_var;           // [groups] or null
  C *mean, *var;                             // [groups]
  int64_t groups, inner, weight_groups, weight_inner;
  int64_t run;  // elements that share a factor
  Factors factors;
  RowShape shape;
  int lanes, across;
  int64_t numel, k, per_part;
  bool centred;
  double eps;

  /// Where the factors of a thread's elements lie, in the group whose own start at `part`. kPacked: one for all N, or
  /// N neighbours.
  template <int N, bool kPacked>
  __device__ __forceinline__ void place_factors(int64_t part, const Slots<kPacked>& s, int64_t (&place)[N]) const {
#pragma unroll
    for (int j = 0; j < (kPacked ? 1 : N); ++j) {
      const int64_t e = s.holds(j) ? s.element(j) : 0;
      if (factors == Factors::kOne) {
        place[j] = part;
      } else if (factors == Factors::kEach) {
        place[j] = part + e;
      } else {
        place[j] = part + static_cast<uint32_t>(e) % static_cast<uint32_t>(inner) / static_cast<uint32_t>(run);
      }
    }
  }
  template <int N, bool kPacked>
  __device__ __forceinline__ void read_factors(const C* values, const int64_t (&place)[N], C (&out)[N]) const {
    if (kPacked && factors == Factors::kEach) {
      const Pack<C, kPack<C>>* from = reinterpret_cast<const Pack<C, kPack<C>>*>(values + place[0]);
#pragma unroll
      for (int c = 0; c < N / kPack<C>; ++c) {
        const Pack<C, kPack<C>> pack = from[c];  // whole: of one element at a time nvcc makes a read for each
#pragma unroll
        for (int j = 0; j < kPack<C>; ++j) out[c * kPack<C> + j] = pack.at[j];
      }
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) out[j] = values[place[kPacked ? 0 : j]];
    }
  }
};

/// What a thread knows of its group once the statistics are there.
template <class C>
struct Normalized {
  C mean, r;
  int64_t part;  // where the group's factors start
};

template <class X, class T>
__device__ __forceinline__ Normalized<typename Compute<X>::type> finish_statistics(const NormalizationJob<X, T>& job,
                                                                                   const OwnRow& row,
                                                                                   const Group& group, double mean,
                                                                                   double var) {
  using C = typename Compute<X>::type;
  if (row.number < 0) return {C(0), C(0), 0};
  const int64_t g = row.number % job.groups;
  if (group.lane == 0 && blockIdx.y == 0 && row.number < job.groups) {
    job.mean[g] = static_cast<C>(mean);
    job.var[g] = static_cast<C>(var);
  }
  return {static_cast<C>(mean), static_cast<C>(1 / sqrt(var + job.eps)), g % job.weight_groups * job.weight_inner};
}

/// y of a thread's elements from x^.
template <class X, class T, int N, bool kPacked, class C>
__device__ __forceinline__ Values<X, N> primal_of(const NormalizationJob<X, T>& job, const Normalized<C>& of,
                                                  const Slots<kPacked>& s, const C (&hat)[N]) {
  int64_t place[N];
  job.place_factors(of.part, s, place);
  C y[N], values[N];
#pragma unroll
  for (int j = 0; j < N; ++j) y[j] = hat[j];
  if (job.weight != nullptr) {
    job.template read_factors<N, kPacked>(job.weight, place, values);
#pragma unroll
    for (int j = 0; j < N; ++j) y[j] *= values[j];
  }
  if (job.bias != nullptr) {
    job.template read_factors<N, kPacked>(job.bias, place, values);
#pragma unroll
    for (int j = 0; j < N; ++j) y[j] += values[j];
  }
  Values<X, N> out;
#pragma unroll
  for (int j = 0; j < N; ++j) out.at(j) = narrow<X>(y[j]);
  return out;
}

/// dy_i of a thread's elements from x^ and dx; shift and turn are the means of dx and dx x^.
template <class X, class T, int N, bool kPacked, class C>
__device__ __forceinline__ Values<T, N> tangent_of(const NormalizationJob<X, T>& job, int64_t i,
                                                   const Normalized<C>& of, const Slots<kPacked>& s, const C (&hat)[N],
                                                   const Values<T, N>& dx, C shift, C turn) {
  int64_t place[N];
  job.place_factors(of.part, s, place);
  C moved[N] = {}, values[N];
  if (job.dx != nullptr) {
#pragma unroll
    for (int j = 0; j < N; ++j) moved[j] = of.r * (widen(dx.at(j)) - shift - turn * hat[j]);
    if (job.weight != nullptr) {
      job.template read_factors<N, kPacked>(job.weight, place, values);
#pragma unroll
      for (int j = 0; j < N; ++j) moved[j] *= values[j];
    }
  }
  const int64_t set = i * job.weight_groups * job.weight_inner;
  if (job.dweight != nullptr) {
    job.template read_factors<N, kPacked>(job.dweight + set, place, values);
#pragma unroll
    for (int j = 0; j < N; ++j) moved[j] += values[j] * hat[j];
  }
  if (job.dbias != nullptr) {
    job.template read_factors<N, kPacked>(job.dbias + set, place, values);
#pragma unroll
    for (int j = 0; j < N; ++j) moved[j] += values[j];
  }
  Values<T, N> dy;
#pragma unroll
  for (int j = 0; j < N; ++j) dy.at(j) = narrow<T>(moved[j]);
  return dy;
}

template <bool kPacked, class X, class T>
__global__ void __launch_bounds__(kRowThreads) normalization_held_kernel(NormalizationJob<X, T> job) {
  using C = typename Compute<X>::type;
  constexpr int N = kRowElements<kPacked, X, T>, P = kHeld<kPacked, X> / N;
  FROG_SHARED(double, shared);
  const Group group(job.lanes, job.across, shared);
  const OwnRow row = own_row(job.shape, group);
  const auto address = [&](int64_t e) { return row.base + job.shape.offset(e); };
  const auto slots = [&](int q) { return row_slots<N, kPacked>(row, group, int64_t{q} * group.lanes * N); };
  const int64_t first = blockIdx.y * job.per_part, last = min(first + job.per_part, job.k);
  const double count = static_cast<double>(job.shape.n);

  C hat[P][N];
  Values<T, N> ahead[P] = {};
  {
    Values<X, N> in[P];
#pragma unroll
    for (int q = 0; q < P; ++q) in[q] = read<N>(job.x, slots(q), address);
    if (job.dx != nullptr) {
#pragma unroll
      for (int q = 0; q < P; ++q) ahead[q] = read<N>(job.dx + first * job.numel, slots(q), address);
    }
#pragma unroll
    for (int q = 0; q < P; ++q) {
#pragma unroll
      for (int j = 0; j < N; ++j) hat[q][j] = widen(in[q].at(j));  // 0 outside
    }
  }

  double mean = 0, var = 0;
  if (job.given_mean != nullptr) {
    if (row.number >= 0) {
      mean = static_cast<double>(job.given_mean[row.number % job.groups]);
      var = static_cast<double>(job.given_var[row.number % job.groups]);
    }
  } else {
    if (job.centred) {
      C part = 0;
#pragma unroll
      for (int q = 0; q < P; ++q) {
#pragma unroll
        for (int j = 0; j < N; ++j) part += hat[q][j];
      }
      double total[1] = {static_cast<double>(part)};
      group.sum(total);
      mean = total[0] / count;
    }
    C part = 0;
#pragma unroll
    for (int q = 0; q < P; ++q) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const C away = hat[q][j] - static_cast<C>(mean);
        part += slots(q).holds(j) ? away * away : C(0);
      }
    }
    double total[1] = {static_cast<double>(part)};
    group.sum(total);
    var = total[0] / count;
  }
  const Normalized<C> of = finish_statistics(job, row, group, mean, var);
#pragma unroll
  for (int q = 0; q < P; ++q) {
#pragma unroll
    for (int j = 0; j < N; ++j) hat[q][j] = slots(q).holds(j) ? (hat[q][j] - of.mean) * of.r : C(0);
    if (blockIdx.y == 0) write<N>(job.y, slots(q), address, primal_of(job, of, slots(q), hat[q]));
  }

  for (int64_t i = first; i < last; ++i) {
    Values<T, N> dx[P] = {};
    C shift = 0, turn = 0;
    if (job.dx != nullptr) {
      C sum = 0, product = 0;
#pragma unroll
      for (int q = 0; q < P; ++q) {
        dx[q] = ahead[q];
        if (i + 1 < last) ahead[q] = read<N>(job.dx + (i + 1) * job.numel, slots(q), address);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          sum += widen(dx[q].at(j));
          product += widen(dx[q].at(j)) * hat[q][j];
        }
      }
      if (job.given_mean == nullptr) {
        double totals[2] = {static_cast<double>(sum), static_cast<double>(product)};
        group.sum(totals);
        shift = job.centred ? static_cast<C>(totals[0] / count) : C(0);
        turn = static_cast<C>(totals[1] / count);
      }
    }
#pragma unroll
    for (int q = 0; q < P; ++q) {
      write<N>(job.dy + i * job.numel, slots(q), address, tangent_of(job, i, of, slots(q), hat[q], dx[q], shift, turn));
    }
  }
}

template <bool kPacked, class X, class T>
__global__ void __launch_bounds__(kRowThreads) normalization_long_kernel(NormalizationJob<X, T> job) {
  using C = typename Compute<X>::type;
  constexpr int N = kRowElements<kPacked, X, T>, kTogether = Group::kMostValues / 2;
  FROG_SHARED(double, shared);
  const Group group(job.lanes, job.across, shared);
  const OwnRow row = own_row(job.shape, group);
  const auto address = [&](int64_t e) { return row.base + job.shape.offset(e); };
  const int64_t n = job.shape.n, share = int64_t{group.lanes} * N;
  const int64_t first = blockIdx.y * job.per_part, last = min(first + job.per_part, job.k);
  const double count = static_cast<double>(n);
  // sum of f(x) over the group: N at a time in C, these in double
  const auto sum_of = [&](const auto& f) {
    double total[1] = {0};
    for_each_share<N, kPacked>(job.x, row, group, address, n, [&](const Slots<kPacked>& s, const Values<X, N>& in) {
      C part = 0;
#pragma unroll
      for (int j = 0; j < N; ++j) part += s.holds(j) ? f(widen(in.at(j))) : C(0);
      total[0] += static_cast<double>(part);
    });
    group.sum(total);
    return total[0];
  };

  double mean = 0, var = 0;
  if (job.given_mean != nullptr) {
    if (row.number >= 0) {
      mean = static_cast<double>(job.given_mean[row.number % job.groups]);
      var = static_cast<double>(job.given_var[row.number % job.groups]);
    }
  } else {
    if (job.centred) mean = sum_of([](C x) { return x; }) / count;
    const C centre = static_cast<C>(mean);
    var = sum_of([centre](C x) { return (x - centre) * (x - centre); }) / count;
  }
  const Normalized<C> of = finish_statistics(job, row, group, mean, var);
  const auto hat_of = [&](const Slots<kPacked>& s, const Values<X, N>& in, C(&hat)[N]) {
#pragma unroll
    for (int j = 0; j < N; ++j) hat[j] = s.holds(j) ? (widen(in.at(j)) - of.mean) * of.r : C(0);
  };
  const auto read_hat = [&](const Slots<kPacked>& s, C(&hat)[N]) { hat_of(s, read<N>(job.x, s, address), hat); };
  if (blockIdx.y == 0) {
    for_each_share<N, kPacked>(job.x, row, group, address, n, [&](const Slots<kPacked>& s, const Values<X, N>& in) {
      C hat[N];
      hat_of(s, in, hat);
      write<N>(job.y, s, address, primal_of(job, of, s, hat));
    });
  }

  for (int64_t i = first; i < last; i += kTogether) {
    C shift[kTogether] = {}, turn[kTogether] = {};
    if (job.dx != nullptr && job.given_mean == nullptr) {
      double totals[2 * kTogether] = {};
      for (int64_t from = 0; from < n; from += share) {
        const Slots<kPacked> s = row_slots<N, kPacked>(row, group, from);
        Values<T, N> dx[kTogether] = {};
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
          if (i + u < last) dx[u] = read<N>(job.dx + (i + u) * job.numel, s, address);
        }
        C hat[N];
        read_hat(s, hat);
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
          if (i + u >= last) continue;
          C sum = 0, product = 0;
#pragma unroll
          for (int j = 0; j < N; ++j) {
            sum += widen(dx[u].at(j));
            product += widen(dx[u].at(j)) * hat[j];
          }
          totals[2 * u] += static_cast<double>(sum);
          totals[2 * u + 1] += static_cast<double>(product);
        }
      }
      group.sum(totals);
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        shift[u] = job.centred ? static_cast<C>(totals[2 * u] / count) : C(0);
        turn[u] = static_cast<C>(totals[2 * u + 1] / count);
      }
    }
    for (int64_t from = 0; from < n; from += share) {
      const Slots<kPacked> s = row_slots<N, kPacked>(row, group, from);
      Values<T, N> dx[kTogether] = {};
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        if (i + u < last && job.dx != nullptr) dx[u] = read<N>(job.dx + (i + u) * job.numel, s, address);
      }
      C hat[N];
      read_hat(s, hat);
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        if (i + u >= last) continue;
        write<N>(job.dy + (i + u) * job.numel, s, address,
                 tangent_of(job, i + u, of, s, hat, dx[u], shift[u], turn[u]));
      }
    }
  }
}

/// The arguments of normalization_jvp, once checked: x, y [outer, groups, inner]; dx, dy [k, outer, groups, inner].
template <class X, class T>
void launch_normalization(const X* x, const T* dx, const typename Compute<X>::type* weight,
                          const typename Compute<X>::type* dweight, const typename Compute<X>::type* bias,
                          const typename Compute<X>::type* dbias, const typename Compute<X>::type* given_mean,
                          const typename Compute<X>::type* given_var, X* y, T* dy, typename Compute<X>::type* mean,
                          typename Compute<X>::type* var, int64_t outer, int64_t groups, int64_t inner, int64_t k,
                          int64_t weight_groups, int64_t weight_inner, bool centred, double eps, cudaStream_t stream) {
  const int64_t numel = outer * groups * inner;
  if (numel == 0) return;
  RowShape shape;
  if (given_mean != nullptr) {  // nothing is summed: what lies together is a row
    shape = dense_rows(outer * groups, inner);
  } else if (outer == 1 || groups == 1) {
    shape = dense_rows(groups, outer * inner);
  } else {
    shape = RowShape{groups, outer * inner, groups, 0, inner, inner, groups * inner};
  }
  const Factors factors = weight_inner == 1                           ? Factors::kOne
                          : weight_inner == inner && inner == shape.n ? Factors::kEach
                                                                      : Factors::kRuns;
  const int64_t run = inner / weight_inner;
  bool aligned = aligned16(x) && aligned16(dx) && aligned16(y) && aligned16(dy);
  for (const auto* p : {weight, dweight, bias, dbias}) aligned = aligned && aligned16(p);
  if (factors == Factors::kRuns) {
    if (shape.n >= int64_t{1} << 32) throw std::runtime_error("a group of 2^32 elements or more is too long");
    aligned = aligned && run % kElements<X, T> == 0;
  }
  dispatch_rows<X, T>(shape, k, aligned, [&](auto packed, const RowLaunch& l) {
    constexpr bool kPacked = decltype(packed)::value;
    launch(l.held ? normalization_held_kernel<kPacked, X, T> : normalization_long_kernel<kPacked, X, T>, l.grid,
           l.block, l.shared, stream,
           NormalizationJob<X, T>{
               x,         dx,      y,        dy,     weight, dweight,       bias,         dbias, given_mean,
               given_var, mean,    var,      groups, inner,  weight_groups, weight_inner, run,   factors,
               shape,     l.lanes, l.across, numel,  k,      l.per_part,    centred,      eps});
  });
}

}  // namespace frog
