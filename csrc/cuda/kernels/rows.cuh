// Rows that are reduced and then used, however they lie in memory: which threads share one, and where its elements are.
//
// A row that kHeld elements a thread can hold is read once and stays in registers; `held` kernels rely on it. Longer
// ones are read again.
#pragma once

#include <type_traits>

#include "packs.cuh"
#include "reduce.cuh"

namespace frog {

/// Threads of a block at most: 128 registers are left for each.
constexpr int kRowThreads = 512;

/// Elements that a thread reads together, and those of a row that it can hold, in registers. Where they cannot be read
/// 16 bytes at a time, little would be gained by holding many.
template <bool kPacked, class X, class T>
constexpr int kRowElements = kPacked ? kElements<X, T> : 2;
template <bool kPacked, class X>
constexpr int kHeld = kPacked ? 64 / sizeof(typename Compute<X>::type) : 8;

/// Rows of n elements. Element e of row r has the address
///   r / columns * block + r % columns * step + e / run * stride + e % run,
/// n < 2^32 where run < n: divisions of 32 bits take a fraction of the time.
struct RowShape {
  int64_t rows, n;
  int64_t columns, block, step;
  int64_t run, stride;

  __host__ __device__ int64_t base(int64_t r) const {
    return columns == 1 ? r * block : r / columns * block + r % columns * step;
  }
  __device__ __forceinline__ int64_t offset(int64_t e) const {
    if (run >= n) return e;
    if (run == 1) return e * stride;
    const uint32_t q = static_cast<uint32_t>(e) / static_cast<uint32_t>(run);
    return q * stride + (static_cast<uint32_t>(e) - q * static_cast<uint32_t>(run));
  }
};
inline RowShape dense_rows(int64_t rows, int64_t n) { return {rows, n, 1, n, 0, n, 0}; }
/// x [outer, n, inner], a row for each column of each of the outer matrices.
inline RowShape strided_rows(int64_t outer, int64_t n, int64_t inner) {
  return inner == 1 ? dense_rows(outer, n) : RowShape{outer * inner, n, inner, n * inner, 1, 1, inner};
}

/// How a launch shares rows among threads.
struct RowLaunch {
  dim3 grid, block;
  size_t shared;
  int lanes, across;
  int64_t per_part;  // tangents of a block
  bool held;
};

/// The smallest power of two that is at least `n`, but not above `most`, itself one.
inline int power_of_two(int64_t n, int most) {
  int p = 1;
  while (p < n && p < most) p *= 2;
  return p;
}

/// Threads read `elements` at a time and can hold `held`.
inline RowLaunch plan_rows(const RowShape& s, int64_t k, int elements, int held) {
  RowLaunch l{};
  int threads;
  int64_t blocks;
  if (s.run == 1 && s.columns > 1) {  // neighbouring threads on neighbouring columns
    l.across = power_of_two(s.columns, kWarp);
    l.lanes = max(kWarp / l.across, power_of_two(ceil_div(s.n, held), kRowThreads / l.across));
    threads = l.lanes * l.across;
    blocks = ceil_div(s.columns, l.across) * (s.rows / s.columns);
  } else {
    l.across = 1;
    l.lanes = s.n > int64_t{kWarp} * held ? power_of_two(ceil_div(s.n, held), kRowThreads)
                                          : power_of_two(ceil_div(s.n, elements), kWarp);
    threads = l.lanes > kWarp ? l.lanes : 128;
    blocks = ceil_div(s.rows, threads / l.lanes);
  }
  // Few rows do not fill the device: then parts of the tangents get blocks of their own, and read the primal again.
  const int64_t fill = blocks_of_device(1024 / threads);
  l.per_part = ceil_div(k, min(k, max(int64_t{1}, fill / blocks)));
  l.grid = dim3(blocks, ceil_div(k, l.per_part));
  l.block = dim3(threads);
  l.shared = Group::shared_bytes(l.lanes, l.across);
  l.held = s.n <= int64_t{l.lanes} * held;
  return l;
}

/// Calls body(std::bool_constant<packed>, plan). aligned: all tensors start at multiples of 16 bytes.
template <class X, class T, class Body>
void dispatch_rows(const RowShape& s, int64_t k, bool aligned, const Body& body) {
  if (s.run > 0 && s.n >= int64_t{1} << 32 && s.run < s.n && s.run > 1) {
    throw std::runtime_error("a group of " + std::to_string(s.n) + " elements that do not lie together is too long");
  }
  if (aligned && s.run % kElements<X, T> == 0) {
    body(std::true_type(), plan_rows(s, k, kRowElements<true, X, T>, kHeld<true, X>));
  } else {
    body(std::false_type(), plan_rows(s, k, kRowElements<false, X, T>, kHeld<false, X>));
  }
}

/// The row of a thread: its number, or -1 beyond the last, and the address of its first element.
struct OwnRow {
  int64_t number, base, n;  // n = 0 beyond the last row
};
__device__ __forceinline__ OwnRow own_row(const RowShape& s, const Group& g) {
  int64_t r;
  bool inside;
  if (g.across > 1) {
    const int64_t sets = ceil_div(s.columns, g.across), column = blockIdx.x % sets * g.across + g.row;
    inside = column < s.columns;
    r = blockIdx.x / sets * s.columns + column;
  } else {
    r = int64_t{blockIdx.x} * (blockDim.x / g.lanes) + g.row;
    inside = r < s.rows;
  }
  return inside ? OwnRow{r, s.base(r), s.n} : OwnRow{-1, 0, 0};
}

/// The thread's N elements of the share of its row that starts at element `from`.
template <int N, bool kPacked>
__device__ __forceinline__ Slots<kPacked> row_slots(const OwnRow& row, const Group& g, int64_t from) {
  return kPacked ? Slots<kPacked>{from + g.lane * N, row.n, 1} : Slots<kPacked>{from + g.lane, row.n, g.lanes};
}

/// Calls body(slots, values) for the thread's shares of a long row x, one after the other. Several are read before the
/// first is used: what one read of each thread keeps under way does not cover the time that memory takes.
template <int N, bool kPacked, class X, class Address, class Body>
__device__ __forceinline__ void for_each_share(const X* x, const OwnRow& row, const Group& group,
                                               const Address& address, int64_t n, const Body& body) {
  constexpr int kAhead = 4;
  const int64_t share = int64_t{group.lanes} * N;
  for (int64_t from = 0; from < n; from += kAhead * share) {
    Values<X, N> in[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      in[a] = read<N>(x, row_slots<N, kPacked>(row, group, from + a * share), address);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) body(row_slots<N, kPacked>(row, group, from + a * share), in[a]);
  }
}

/// Largest element of a long row and the sum of exp(x - largest).
template <int N, bool kPacked, class X, class Address>
__device__ __forceinline__ void softmax_statistics(const X* x, const OwnRow& row, const Group& group,
                                                   const Address& address, int64_t n,
                                                   typename Compute<X>::type* largest, double* sum) {
  using C = typename Compute<X>::type;
  C top = C(-INFINITY);
  for_each_share<N, kPacked>(x, row, group, address, n, [&](const Slots<kPacked>& s, const Values<X, N>& in) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (s.holds(j)) top = fmax(top, widen(in.at(j)));
    }
  });
  *largest = top = group.max(top);
  double total[1] = {0};
  for_each_share<N, kPacked>(x, row, group, address, n, [&](const Slots<kPacked>& s, const Values<X, N>& in) {
    C part = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) part += s.holds(j) ? exp(widen(in.at(j)) - top) : C(0);
    total[0] += static_cast<double>(part);
  });
  group.sum(total);
  *sum = total[0];
}

}  // namespace frog
