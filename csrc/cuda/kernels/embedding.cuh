// embedding_jvp: rows of a table and of k tangents of it. An index that is no row cannot be refused by a kernel: its
// value and tangents are NaN, as everything is for a step outside [0, 2^32).
//
// Floor: y and dy are written once, and what is looked up is read once. Eight lanes take a group of 64 elements of the
// global tangent vector, a call of Philox each for normal tangents, and write two runs of 128 bytes of it; only groups
// in which a row lies are drawn. Signs share a call among the eight lanes, 60 instructions for 8 elements, which is
// still less than a normal element takes.
#pragma once

#include "draw.cuh"

namespace frog {

constexpr int kLookUpThreads = 256;
constexpr int kLanesOfGroup = kCallsPerGroup;

/// The row that place p asks for, or -1.
__device__ __forceinline__ int64_t row_of(const int64_t* __restrict__ indices, int64_t p, int64_t rows) {
  const int64_t row = indices[p];
  return row >= 0 && row < rows ? row : -1;
}

// tables [count, rows, dim] -> out [count, places, dim], N elements at a time. Grid: x over a table's result, y over
// tables.
template <int N, class T>
__global__ void __launch_bounds__(kLookUpThreads)
    look_up_kernel(const T* __restrict__ tables, const int64_t* __restrict__ indices, T* __restrict__ out,
                   int64_t count, int64_t rows, int64_t dim, int64_t places) {
  const int64_t packs = dim / N;
  for (int64_t i = blockIdx.y; i < count; i += gridDim.y) {
    for (int64_t j = int64_t{blockIdx.x} * kLookUpThreads + threadIdx.x; j < places * packs;
         j += int64_t{gridDim.x} * kLookUpThreads) {
      const int64_t place = j / packs, row = row_of(indices, place, rows), at = j % packs * N;
      Pack<T, N> pack;
      if (row >= 0) {
        pack = *reinterpret_cast<const Pack<T, N>*>(tables + (i * rows + row) * dim + at);
      } else {
#pragma unroll
        for (int e = 0; e < N; ++e) pack.at[e] = narrow<T>(static_cast<typename Compute<T>::type>(NAN));
      }
      *reinterpret_cast<Pack<T, N>*>(out + (i * places + place) * dim + at) = pack;
    }
  }
}

/// Elements normal_place(lane) .. + 3 of a group of 64, and those 32 later, of tangent i.
__device__ __forceinline__ void group_elements(const Stream& stream, const int64_t* __restrict__ state, int64_t i,
                                               int64_t group, int lane, int64_t distribution, float out[8]) {
  const int place = normal_place(lane);
  if (distribution == kStandardBasis) {
    const int64_t coordinate = state[i], hit = coordinate - group * kNormalGroup - place;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      out[j] = coordinate < 0 ? NAN : hit == j ? 1.0f : 0.0f;
      out[4 + j] = coordinate < 0 ? NAN : hit == 32 + j ? 1.0f : 0.0f;
    }
  } else if (!stream.valid) {
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = NAN;
  } else if (distribution == kRademacher) {
    // a group of 1024 is two halves of eight groups of 64; call c has both runs of group c of either half
    const int64_t sixteen = group / 16;
    const int part = static_cast<int>(group % 16);
    const PhiloxWords words =
        draw_words(stream, i, static_cast<uint64_t>(sixteen * kCallsPerGroup + part % kCallsPerGroup));
    const bool upper = part >= kCallsPerGroup;
    const uint32_t low = upper ? words.w[2] : words.w[0], high = upper ? words.w[3] : words.w[1];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      out[j] = sign_element<float>((low >> (place + j)) & 1u);
      out[4 + j] = sign_element<float>((high >> (place + j)) & 1u);
    }
  } else {
    normal_elements(draw_words(stream, i, static_cast<uint64_t>(group * kCallsPerGroup + lane)), out);
  }
}

// out [k, places, dim]. Grid: x over places and the groups that a row may touch, y over tangents.
template <class T>
__global__ void __launch_bounds__(kLookUpThreads)
    draw_rows_kernel(const int64_t* __restrict__ state, const int64_t* __restrict__ indices, T* __restrict__ out,
                     int64_t first, int64_t k, int64_t rows, int64_t dim, int64_t places, int64_t offset,
                     int64_t groups, int64_t distribution) {
  using C = typename Compute<T>::type;
  const int lane = static_cast<int>(threadIdx.x) % kLanesOfGroup;
  Stream stream = {};
  if (distribution != kStandardBasis) stream = read_stream(state);
  for (int64_t i = blockIdx.y; i < k; i += gridDim.y) {
    for (int64_t j = (int64_t{blockIdx.x} * kLookUpThreads + threadIdx.x) / kLanesOfGroup; j < places * groups;
         j += int64_t{gridDim.x} * (kLookUpThreads / kLanesOfGroup)) {
      const int64_t place = j / groups, row = row_of(indices, place, rows);
      const int64_t start = offset + (row < 0 ? 0 : row) * dim, group = start / kNormalGroup + j % groups;
      if (group * kNormalGroup >= start + dim) continue;  // the row touches fewer groups
      float drawn[8];
      if (row >= 0) {
        group_elements(stream, state, first + i, group, lane, distribution, drawn);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) drawn[e] = NAN;
      }
      T* const to = out + (i * places + place) * dim;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t at = group * kNormalGroup + normal_place(lane) + 32 * half - start;  // in the row
        Pack<T, 4> pack;
#pragma unroll
        for (int e = 0; e < 4; ++e) pack.at[e] = narrow<T>(static_cast<C>(drawn[4 * half + e]));
        if (at >= 0 && at + 4 <= dim && reinterpret_cast<uintptr_t>(to + at) % sizeof(pack) == 0) {
          *reinterpret_cast<Pack<T, 4>*>(to + at) = pack;
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (at + e >= 0 && at + e < dim) to[at + e] = pack.at[e];
          }
        }
      }
    }
  }
}

inline dim3 look_up_grid(int64_t threads, int64_t rows) {
  const int64_t blocks = ceil_div(threads, kLookUpThreads);
  return dim3(static_cast<unsigned>(blocks < 0x7FFFFFFF ? blocks : 0x7FFFFFFF),
              static_cast<unsigned>(rows < 65535 ? rows : 65535));
}

/// tables [count, rows, dim] -> out [count, places, dim].
template <class T>
void launch_look_up(const T* tables, const int64_t* indices, T* out, int64_t count, int64_t rows, int64_t dim,
                    int64_t places, cudaStream_t stream) {
  if (places * dim == 0) return;
  const bool packed = dim % kPack<T> == 0 && aligned16(tables) && aligned16(out);
  const auto go = [&](auto kernel, int64_t packs) {
    launch(kernel, look_up_grid(places * packs, count), dim3(kLookUpThreads), 0, stream, tables, indices, out, count,
           rows, dim, places);
  };
  if (packed) {
    go(look_up_kernel<kPack<T>, T>, dim / kPack<T>);
  } else {
    go(look_up_kernel<1, T>, dim);
  }
}

/// out [k, places, dim]: rows of tangents first .. first + k of a table [rows, dim] that starts at `offset`.
template <class T>
void launch_draw_rows(const int64_t* state, const int64_t* indices, T* out, int64_t k, int64_t rows, int64_t dim,
                      int64_t places, int64_t offset, int64_t first, int64_t distribution, cudaStream_t stream) {
  if (places * dim == 0) return;
  const bool whole = dim % kNormalGroup == 0 && offset % kNormalGroup == 0;
  const int64_t groups = whole ? dim / kNormalGroup : (dim + kNormalGroup - 2) / kNormalGroup + 1;
  launch(draw_rows_kernel<T>, look_up_grid(places * groups * kLanesOfGroup, k), dim3(kLookUpThreads), 0, stream, state,
         indices, out, first, k, rows, dim, places, offset, groups, distribution);
}

}  // namespace frog
