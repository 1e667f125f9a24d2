// A tile of a sampled weight tangent, [kRows, kChunk] in shared memory, drawn by all threads of a block and multiplied
// with many rows of x before the next one takes its place. Element (row, column) of the tile of chunk c is element
// start + row * in + kChunk * c + column of the tangent; groups of elements that one call or eight calls of Philox give
// start wherever `start` and `in` put them.
//
// Normal: a chunk is as long as a group, 64 elements, and touches two groups of a row unless they start together. A
// thread has the same two calls of every chunk, one for each half of the preparation; what they gave for the group
// before waits in registers, so that nothing is drawn twice.
//
// Rademacher: a call gives 128 bits that lie in two places 512 elements apart, so the bits of kSignColumns columns are
// drawn at a time, and shifted into place as tiles are made of them.
//
// Where the elements of a row do not follow one another, ScatteredTile draws them run by run.
#pragma once

#include "draw.cuh"

namespace frog {

constexpr int kChunk = 64;          // columns of a tile
constexpr int kSignColumns = 1024;  // columns of signs drawn at a time
constexpr int kSignChunks = kSignColumns / kChunk;
constexpr int kSignWords = kSignColumns / 32 + 1;  // of a row: odd, so that rows start in different banks

/// Where element (row, column) of a tile [*, kColumns] lies: 16-byte pieces of a row are exchanged so that the pieces
/// of 8 rows in one column are in different banks.
template <class E, int kColumns>
__device__ __forceinline__ int place(uint32_t row, uint32_t column) {
  constexpr uint32_t kPiece = kPack<E>, kPieces = kColumns / kPiece;
  static_assert(kPieces == 4 || kPieces % 8 == 0);
  const uint32_t exchange = kPieces == 4 ? row / 2 & 3 : row & 7;
  return static_cast<int>(row * kColumns + ((column / kPiece) ^ exchange) * kPiece + column % kPiece);
}

/// How a tangent element of a product in T is represented: kParts elements of E that add up to it.
template <class T, int64_t kDistribution>
struct TangentParts {
  using E = T;  // bfloat16, float16, double
  static constexpr int kParts = 1;
  __device__ static __forceinline__ void split(float v, E (&parts)[kParts]) { parts[0] = narrow<T>(v); }
};
/// float32: three bfloat16 of 8 bits each, cut off so that they add up exactly; a sign needs one.
template <int64_t kDistribution>
struct TangentParts<float, kDistribution> {
  using E = bf16;
  static constexpr int kParts = kDistribution == kRademacher ? 1 : 3;
  __device__ static __forceinline__ void split(float v, E (&parts)[kParts]) {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const uint32_t high = float_bits(v) & 0xFFFF0000u;
      parts[p] = {static_cast<uint16_t>(high >> 16)};
      v -= bits_float(high);
    }
  }
};

/// The eight elements of a normal call, kept in as few registers as they need.
template <class Parts>
struct KeptCall {
  static constexpr bool kPairs = sizeof(typename Parts::E) == 2 && Parts::kParts == 1;
  std::conditional_t<kPairs, uint32_t, float> at[kPairs ? 4 : 8] = {};

  __device__ __forceinline__ void put(const float (&v)[8]) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if constexpr (kPairs) {
        typename Parts::E parts[1];
        Parts::split(v[e], parts);
        at[e / 2] = e % 2 == 0 ? parts[0].bits : at[e / 2] | static_cast<uint32_t>(parts[0].bits) << 16;
      } else {
        at[e] = v[e];
      }
    }
  }
  /// Element e of `first` or else of `second`. (Values are chosen, not calls: registers have no address.)
  __device__ static __forceinline__ void get(bool of_first, const KeptCall& first, const KeptCall& second, int e,
                                             typename Parts::E (&parts)[Parts::kParts]) {
    if constexpr (kPairs) {
      parts[0] = {static_cast<uint16_t>((of_first ? first.at[e / 2] : second.at[e / 2]) >> (16 * (e % 2)))};
    } else {
      Parts::split(of_first ? first.at[e] : second.at[e], parts);
    }
  }
};

/// Which tangent elements a block works on.
struct TangentRows {
  Stream stream;
  int64_t tangent;
  uint64_t start, in;  // element index of the tile's first row in the block's first column; elements from row to row
  int live;            // rows of the tile that exist; the others are not drawn
  int columns;         // of the block
  bool quads;          // start and in are multiples of 4
};

/// Those whose rows are runs of `in` elements, a column each, that start `apart` elements from one another. `start` is
/// the element of the tile's first row in column 0, wherever the block starts.
struct ScatteredRows : TangentRows {
  uint64_t apart;
  uint32_t begin;  // the block's first column
};

// prepare<half>() is called for chunks kFirst, kFirst + 1, ..., for half 0 and then half 1 of each, by all threads.
// Those below 0 fill no tile.

template <class Parts, int kRows, int kThreads>
struct NormalTile {
  using E = typename Parts::E;
  using Rows = TangentRows;
  static_assert(kRows * kCallsPerGroup == 2 * kThreads);
  static constexpr int kShared = 0;  // bytes beside the tile
  static constexpr int kFirst = -1;  // draws what the first tile starts with

  KeptCall<Parts> now, other;  // what the latest calls of this half and of the other one gave

  __device__ __forceinline__ void prepare(const TangentRows& t, int chunk, int half, E* tile) {
    // Of eight rows, those that half a warp stores to lie four apart: their pieces are in different banks.
    const uint32_t task = half * kThreads + threadIdx.x, line = task / kCallsPerGroup;
    const int row = static_cast<int>((line & ~7u) | (line & 1) << 2 | (line >> 1 & 3));
    const int call = static_cast<int>(task % kCallsPerGroup);
    if (row < t.live) {
      const uint64_t at = t.start + row * t.in;
      const int late = static_cast<int>(at % kChunk);  // elements of the first group that come before the row
      KeptCall<Parts> next = now;
      if (t.columns - chunk * kChunk > kChunk - late) {  // else this tile's columns end before the next group
        const uint64_t group = at / kChunk + static_cast<uint64_t>(chunk + 1);
        float v[8];
        normal_elements(draw_words(t.stream, t.tangent, group * kCallsPerGroup + call), v);
        next.put(v);
      }
      if (chunk >= 0) store(tile, row, normal_place(call) - late, t.quads, next);
      now = next;
    }
    const KeptCall<Parts> swapped = now;
    now = other, other = swapped;
  }

  // The two quads of a call, 32 columns apart: from this group where they come at column 0 or later, else from the
  // next.
  __device__ __forceinline__ void store(E* tile, int row, int column, bool quads, const KeptCall<Parts>& next) const {
#pragma unroll
    for (int h = 0; h < 8; h += 4) {
      const int first = column + 8 * h;
      E parts[4][Parts::kParts];
#pragma unroll
      for (int e = 0; e < 4; ++e) KeptCall<Parts>::get(first + e >= 0, now, next, h + e, parts[e]);
#pragma unroll
      for (int p = 0; p < Parts::kParts; ++p) {
        E* const to = tile + p * kRows * kChunk;
        if (quads) {
          constexpr int kAtOnce = kPack<E> < 4 ? kPack<E> : 4;
#pragma unroll
          for (int e = 0; e < 4; e += kAtOnce) {
            Pack<E, kAtOnce> pack;
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) pack.at[j] = parts[e + j][p];
            *reinterpret_cast<Pack<E, kAtOnce>*>(to + place<E, kChunk>(row, (first & (kChunk - 1)) + e)) = pack;
          }
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e) to[place<E, kChunk>(row, (first + e) & (kChunk - 1))] = parts[e][p];
        }
      }
    }
  }
};

template <class Parts, int kRows, int kThreads>
struct SignTile {
  using E = typename Parts::E;
  using Rows = TangentRows;
  static_assert(kRows * (kChunk / 8) == 2 * kThreads);
  static constexpr int kShared = kRows * kSignWords * sizeof(uint32_t);
  static constexpr int kFirst = 0;

  uint32_t* words;  // [kRows, kSignWords]: bits of a row from that of its first column's word on

  // The bits of chunks first .. first + kSignChunks, or up to the last one; all of a chunk, also beyond the row's end.
  __device__ __forceinline__ void draw_signs(const TangentRows& t, int first) {
    const int left = (t.columns + kChunk - 1) / kChunk * kChunk - kChunk * first;
    const int columns = left < kSignColumns ? left : kSignColumns;
    const bool whole = t.start % kRademacherGroup == 0 && t.in % kRademacherGroup == 0;
    const int calls = whole ? kCallsPerGroup : 2 * kCallsPerGroup;  // of the groups that a row can touch
    for (int task = static_cast<int>(threadIdx.x); task < t.live * calls; task += kThreads) {
      const int row = task / calls, call = task % kCallsPerGroup, next = task % calls / kCallsPerGroup;
      const uint64_t at = t.start + row * t.in + kChunk * first;
      const int skipped = static_cast<int>(at % kRademacherGroup) / 32;  // words of the first group before the row
      const int last = (static_cast<int>(at % 32) + columns - 1) / 32;
      bool wanted = false;
      int to[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        to[w] = 32 * next + sign_run(call, w) - skipped;
        wanted |= to[w] >= 0 && to[w] <= last;
      }
      if (!wanted) continue;
      const uint64_t group = at / kRademacherGroup + next;
      const PhiloxWords drawn = draw_words(t.stream, t.tangent, group * kCallsPerGroup + call);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if (to[w] >= 0 && to[w] <= last) words[row * kSignWords + to[w]] = drawn.w[w];
      }
    }
    __syncthreads();
  }

  // Elements of eight bits, 16 bytes at a time.
  __device__ static __forceinline__ void store(E* to, uint32_t row, uint32_t column, uint32_t bits) {
    if constexpr (sizeof(E) == 2) {
      const uint32_t ones = sign_element<E>(0).bits * 0x10001u;
      uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // bit 0 to bit 15, bit 1 to bit 31
        pairs[j] = ((bits >> (2 * j) & 3u) * 0x40008000u & 0x80008000u) | ones;
      }
      *reinterpret_cast<uint4*>(to + place<E, kChunk>(row, column)) =
          make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    } else {
#pragma unroll
      for (int e = 0; e < 8; e += kPack<E>) {
        Pack<E, kPack<E>> pack;
#pragma unroll
        for (int j = 0; j < kPack<E>; ++j) pack.at[j] = sign_element<E>(bits >> (e + j) & 1u);
        *reinterpret_cast<Pack<E, kPack<E>>*>(to + place<E, kChunk>(row, column + e)) = pack;
      }
    }
  }

  __device__ __forceinline__ void prepare(const TangentRows& t, int chunk, int half, E* tile) {
    if (half == 0 && chunk % kSignChunks == 0) draw_signs(t, chunk);
    const uint32_t task = half * kThreads + threadIdx.x, row = task / (kChunk / 8), column = task % (kChunk / 8) * 8;
    if (static_cast<int>(row) >= t.live) return;
    const uint32_t begin = static_cast<uint32_t>(t.start) + row * static_cast<uint32_t>(t.in);
    const uint32_t at = begin % 32 + static_cast<uint32_t>(chunk) % kSignChunks * kChunk + column;
    const uint32_t* const from = words + row * kSignWords + at / 32;
    const uint32_t shift = at % 32;
    uint32_t bits = from[0] >> shift;
    if (shift > 24) bits |= from[1] << (32 - shift);
    store(tile, row, column, bits);
  }
};

/// Rows of runs, eight columns of a row to a thread at a time. Half a call of normal elements, four, or a word of signs
/// serves what it has in common with a run and with the eight columns; the rest of the call is thrown away. In compiled
/// code, where elements that follow one another take 40 instructions if normal and 8 if signs, about 80 and 60 in runs
/// of nine, 170 and 155 in runs of one.
template <class Parts, int64_t kDistribution, int kRows, int kThreads>
struct ScatteredTile {
  using E = typename Parts::E;
  using Rows = ScatteredRows;
  static constexpr int kAtOnce = 8;                                 // columns of a thread
  static constexpr int kDrawn = kDistribution == kNormal ? 4 : 32;  // elements in a row that are drawn together
  static_assert(kRows * (kChunk / kAtOnce) == 2 * kThreads);
  static constexpr int kShared = 0;
  static constexpr int kFirst = 0;

  /// Element e of the eight. Those of 16 bits are one piece of place(), which is then worked out once.
  __device__ static __forceinline__ void store(E* tile, uint32_t row, uint32_t column, int e, float v) {
    E parts[Parts::kParts];
    Parts::split(v, parts);
    const int at = kPack<E> == kAtOnce ? place<E, kChunk>(row, column) + e : place<E, kChunk>(row, column + e);
#pragma unroll
    for (int p = 0; p < Parts::kParts; ++p) tile[p * kRows * kChunk + at] = parts[p];
  }

  __device__ __forceinline__ void prepare(const ScatteredRows& t, int chunk, int half, E* tile) const {
    const uint32_t task = half * kThreads + threadIdx.x;
    const uint32_t row = task / (kChunk / kAtOnce), column = task % (kChunk / kAtOnce) * kAtOnce;
    if (static_cast<int>(row) >= t.live) return;
    const uint32_t run = static_cast<uint32_t>(t.in), at = t.begin + chunk * kChunk + column;
    uint32_t in_run = at % run;
    uint64_t element = t.start + row * t.in + at / run * t.apart + in_run;
    const int left = t.columns - chunk * kChunk - static_cast<int>(column), wanted = left < kAtOnce ? left : kAtOnce;
    int done = 0;
    while (done < wanted) {
      const int skipped = static_cast<int>(element % kDrawn), of_run = static_cast<int>(run - in_run);
      const int drawn = of_run < kDrawn - skipped ? of_run : kDrawn - skipped;
      const int count = drawn < wanted - done ? drawn : wanted - done;
      if constexpr (kDistribution == kNormal) {
        float quad[kDrawn];
        normal_quad(t.stream, t.tangent, element, quad);
#pragma unroll
        for (int e = 0; e < kDrawn; ++e) {
          if (e >= skipped && e < skipped + count) store(tile, row, column, done + e - skipped, quad[e]);
        }
      } else {
        const uint32_t word = sign_word(t.stream, t.tangent, element) >> skipped;
        for (int e = 0; e < count; ++e) store(tile, row, column, done + e, sign_element<float>(word >> e & 1u));
      }
      done += count, in_run += count, element += count;
      if (in_run == run) in_run = 0, element += t.apart - t.in;
    }
    // Finite beyond the last column, for they are multiplied with zeros.
    for (; done < kAtOnce; ++done) store(tile, row, column, done, 0.0f);
  }
};

}  // namespace frog
