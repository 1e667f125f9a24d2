// attention_jvp on tensor cores, for 16-bit floats: what attention_fma.cuh computes, with float32 sums.
//
// Floor: 2 products of L x S x D multiply-adds for the primal and 4 for each tangent, here 5 for each tangent after the
// first: a warp holds 16 rows of out and of one dout in registers, so Q K^T and exp() are computed again for every
// tangent. Two tangents at a time would save a tenth of the arithmetic, but with 64 columns and 64 keys their sums and
// scores alone are 192 registers.
//
// Layout, as in Dao, "FlashAttention-2" (2023): each warp owns 16 queries and never talks to another one. Scores and
// their tangents stay in registers, and P and P dS go from accumulators into the second product as they are. Q and dQ
// lie in shared memory whole, K and dK, then V and dV for kKeys keys at a time: keys arrive while the values of the
// block before are multiplied, values while scores are computed. Shared memory is what should bound it: a fragment of K
// or V serves 16 rows and one or two products, which makes about 230 bytes read for each m16n8k16 step.
#pragma once

#include "attention_problem.cuh"
#include "mma.cuh"

namespace frog {

constexpr int kMostAttentionWarps = 8;
/// Columns of Q and K that lie in shared memory at once.
constexpr int64_t kMostMmaDepth = 192;
constexpr int kFragmentRows = 16;  // of a warp

/// Elements from row to row in shared memory: an odd multiple of 16 bytes, so that 8 rows of a matrix do not collide.
__host__ __device__ constexpr int matrix_pitch(int columns) { return columns + 8; }

/// Columns of Q and K with the zeros that fill the last step.
template <class E>
int mma_depth(const AttentionProblem<E, E>& p) {
  return static_cast<int>(ceil_div(p.depth, 16) * 16);
}

inline size_t attention_mma_bytes(int warps, int depth, int keys, int width) {
  const size_t queries = 2 * warps * kFragmentRows * matrix_pitch(depth);
  return 2 * (queries + 2 * static_cast<size_t>(keys) * (matrix_pitch(depth) + matrix_pitch(width)));
}

// rows_in_shared x columns_in_shared elements (a multiple of 8) from `from`, zeros where there are none. Eight threads
// take 64 columns of a row.
template <class E>
__device__ __forceinline__ void load_matrix(E* shared, int rows_in_shared, int columns_in_shared, const E* from,
                                            int64_t stride, int rows, int columns, bool packs) {
  static_assert(kPack<E> == 8);
  const int t = static_cast<int>(threadIdx.x), pitch = matrix_pitch(columns_in_shared);
  const int row0 = t / 8, column0 = t % 8 * 8, apart = static_cast<int>(blockDim.x) / 8;
  const E* source = from + row0 * stride + column0;
  E* to = shared + row0 * pitch + column0;
  // Whole pieces of 16 bytes, walked with a few additions each: what bounds a block of keys is the instructions that
  // its warps issue, and loops that are unrolled find every address anew.
  if (packs && columns % 8 == 0) {
    const int64_t source_apart = apart * stride;
#pragma unroll 1
    for (int r = row0; r < rows_in_shared; r += apart, source += source_apart, to += apart * pitch) {
#pragma unroll 1
      for (int c = 0; c + column0 < columns_in_shared; c += 64) {
        const bool inside = r < rows && c + column0 < columns;
        copy_async16(to + c, inside ? source + c : from, inside);
      }
    }
    return;
  }
#pragma unroll 1
  for (int r = row0; r < rows_in_shared; r += apart, source += apart * stride, to += apart * pitch) {
#pragma unroll 1
    for (int c = 0; c + column0 < columns_in_shared; c += 64) {
      Pack<E, 8> pack;
      for (int j = 0; j < 8; ++j) pack.at[j] = r < rows && c + column0 + j < columns ? source[c + j] : E{};
      *reinterpret_cast<Pack<E, 8>*>(to + c) = pack;
    }
  }
}

// d += a b for 16 neighbouring columns of b, whose two fragments are in `b`.
template <class E>
__device__ __forceinline__ void mma_pair(float (&left)[4], float (&right)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[4]) {
  const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
  mma_m16n8k16<E>(left, a, first);
  mma_m16n8k16<E>(right, a, second);
}

// The maximum or sum over the four lanes that share a row.
__device__ __forceinline__ float quad_max(float value) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, step));
  }
  return value;
}
__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(kFullWarp, value, 1);
  return value + __shfl_xor_sync(kFullWarp, value, 2);
}

// A row's columns 8 n + 2 t and the next, 2 t being in `to` already, of which `columns` exist.
template <int kTiles, class E, class Value>
__device__ __forceinline__ void write_row(E* to, int columns, bool pairs, const Value& value) {
  if (pairs && columns >= 8 * kTiles - 6) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      *reinterpret_cast<uint32_t*>(to + 8 * n) = narrow_pair<E>(value(n, 0), value(n, 1));
  } else {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (8 * n + c < columns) to[8 * n + c] = narrow<E>(value(n, c));
      }
    }
  }
}

// grid (B * H * blocks of queries, groups of tangents, blocks of kWidth columns); a multiple of 32 threads, 16 queries
// for each warp; p.depth, rounded up to 16, is kDepth, or `any_depth` where kDepth is 0. kFull: query, key and value
// are all perturbed and width is a multiple of kWidth, which leaves the products without a branch, so that reads of
// fragments move ahead of them.
template <class E, int kKeys, int kWidth, bool kFull, int kDepth>
__global__ void __launch_bounds__(kMostAttentionWarps* kWarp)
    attention_mma_kernel(const AttentionProblem<E, E> p, int any_depth, int per_group, bool pairs_out) {
  constexpr int kScoreTiles = kKeys / 8, kOutTiles = kWidth / 8, kWidePitch = matrix_pitch(kWidth);
  constexpr float kLog2e = 1.4426950408889634f;
  FROG_SHARED(E, shared);
  const int depth = kDepth > 0 ? kDepth : any_depth;
  const int rows = static_cast<int>(blockDim.x) / kWarp * kFragmentRows, pitch = matrix_pitch(depth);
  E* const own_q = shared;  // [rows, pitch]
  E* const own_dq = own_q + rows * pitch;
  E* const own_key = own_dq + rows * pitch;  // [kKeys, pitch]
  E* const own_dkey = own_key + kKeys * pitch;
  E* const own_value = own_dkey + kKeys * pitch;  // [kKeys, kWidePitch]
  E* const own_dvalue = own_value + kKeys * kWidePitch;

  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int g = lane / 4, t = lane % 4, matrix = lane / 8, line = lane % 8;
  const int queries = static_cast<int>(p.queries), all_keys = static_cast<int>(p.keys);
  const int query_blocks = (queries + rows - 1) / rows;
  const int64_t b = blockIdx.x / query_blocks / p.heads, h = blockIdx.x / query_blocks % p.heads;
  const int64_t hkv = h / (p.heads / p.kv_heads);
  // With a causal mask the last blocks have most to do, so they begin.
  const int q0 = (query_blocks - 1 - static_cast<int>(blockIdx.x % query_blocks)) * rows;
  const int row0 = q0 + warp * kFragmentRows;  // of this warp
  const int keys = p.causal && q0 + rows < all_keys ? q0 + rows : all_keys;
  const int visible = p.causal && row0 + kFragmentRows < all_keys ? row0 + kFragmentRows : all_keys;
  const int own_keys = row0 < queries ? visible : 0;  // of this warp
  const int column0 = static_cast<int>(blockIdx.z) * kWidth, rest = static_cast<int>(p.width) - column0;
  const int columns = rest < kWidth ? rest : kWidth, own_depth = static_cast<int>(p.depth);
  const bool moves_q = kFull || p.dquery.data != nullptr, moves_key = kFull || p.dkey.data != nullptr;
  const bool moves_value = kFull || p.dvalue.data != nullptr;
  const float scale = static_cast<float>(p.scale), lowest = -INFINITY;
  const int64_t mask0 = b * p.mask.batch + h * p.mask.head;
  const int64_t head0 = (b * p.heads + h) * p.queries;

  // Rows of the 8 x 8 matrices whose addresses this lane gives: for A of Q, for B of K, and for B of V, transposed.
  const int a_offset = (warp * kFragmentRows + matrix % 2 * 8 + line) * pitch + matrix / 2 * 8;
  const int key_offset = (matrix / 2 * 8 + line) * pitch + matrix % 2 * 8;
  const int value_offset = (matrix % 2 * 8 + line) * kWidePitch + matrix / 2 * 8;

  // Of rows g and g + 8, the scores in units of log 2; the sum over this lane's keys only.
  float top[2] = {lowest, lowest}, sum[2] = {0.0f, 0.0f};
  float out[kOutTiles][4] = {};

  const int from = static_cast<int>(blockIdx.y) * per_group, k_all = static_cast<int>(p.k);
  const int to = k_all - from < per_group ? k_all : from + per_group;
  for (int i = from; i < to; ++i) {
    const bool begins = i == from;
    float dout[kOutTiles][4] = {}, shift[2] = {0.0f, 0.0f};

    const auto load_keys = [&](int j0) {
      load_matrix(own_key, kKeys, depth, p.key.at(0, b, hkv) + j0 * p.key.row, p.key.row, all_keys - j0, own_depth,
                  p.key.packs);
      if (moves_key) {
        load_matrix(own_dkey, kKeys, depth, p.dkey.at(i, b, hkv) + j0 * p.dkey.row, p.dkey.row, all_keys - j0,
                    own_depth, p.dkey.packs);
      }
      copy_async_commit();
    };
    const auto load_values = [&](int j0) {
      load_matrix(own_value, kKeys, kWidth, p.value.at(0, b, hkv) + j0 * p.value.row + column0, p.value.row,
                  all_keys - j0, columns, p.value.packs);
      if (moves_value) {
        load_matrix(own_dvalue, kKeys, kWidth, p.dvalue.at(i, b, hkv) + j0 * p.dvalue.row + column0, p.dvalue.row,
                    all_keys - j0, columns, p.dvalue.packs);
      }
      copy_async_commit();
    };

    // Nobody reads the Q, dQ and K of the tangent before any more: a barrier came after the last scores.
    if (begins) {
      load_matrix(own_q, rows, depth, p.query.at(0, b, h) + q0 * p.query.row, p.query.row, queries - q0, own_depth,
                  p.query.packs);
    }
    if (moves_q) {
      load_matrix(own_dq, rows, depth, p.dquery.at(i, b, h) + q0 * p.dquery.row, p.dquery.row, queries - q0, own_depth,
                  p.dquery.packs);
    }
    if (keys > 0) load_keys(0);

    for (int j0 = 0; j0 < keys; j0 += kKeys) {
      copy_async_wait<0>();
      __syncthreads();  // these keys have arrived, and nobody reads the values before them any more
      load_values(j0);
      const bool own = j0 < own_keys;                                    // the same for the whole warp
      uint32_t weight[kKeys / 16][4] = {}, dweight[kKeys / 16][4] = {};  // P and P dS, as A
      if (own) {
        float score[kScoreTiles][4] = {}, dscore[kScoreTiles][4] = {};
#pragma unroll(kDepth > 0 ? 2 : 1)
        for (int d = 0; d < depth; d += 16) {
          uint32_t q[4], dq[4];
          load_matrices(q, own_q + a_offset + d);
          if (moves_q) load_matrices(dq, own_dq + a_offset + d);
#pragma unroll
          for (int n = 0; n < kScoreTiles; n += 4) {  // four tiles lie between two steps with the same sums
            uint32_t key[2][4], dkey[2][4];
#pragma unroll
            for (int u = 0; u < 2; ++u) {
              const int at = key_offset + (n + 2 * u) * 8 * pitch + d;
              load_matrices(key[u], own_key + at);
              if (moves_key) load_matrices(dkey[u], own_dkey + at);
            }
            if (moves_q) {
#pragma unroll
              for (int u = 0; u < 2; ++u) mma_pair<E>(dscore[n + 2 * u], dscore[n + 2 * u + 1], dq, key[u]);
            }
#pragma unroll
            for (int u = 0; u < 2; ++u) mma_pair<E>(score[n + 2 * u], score[n + 2 * u + 1], q, key[u]);
            if (moves_key) {
#pragma unroll
              for (int u = 0; u < 2; ++u) mma_pair<E>(dscore[n + 2 * u], dscore[n + 2 * u + 1], q, dkey[u]);
            }
          }
        }

        const bool plain =
            p.mask.type == MaskType::kNone && j0 + kKeys <= all_keys && !(p.causal && j0 + kKeys - 1 > row0);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = row0 + g + 8 * r;
          if (!plain) {
#pragma unroll
            for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
              for (int c = 0; c < 2; ++c) {
                const int column = j0 + 8 * n + 2 * t + c;
                float& s = score[n][2 * r + c];
                s *= scale;
                if (column >= all_keys || (p.causal && column > row)) {
                  s = lowest;
                } else if (row < queries) {
                  s = masked_score(s, p.mask, mask0 + row * p.mask.row + column * p.mask.column);
                }
                s *= kLog2e;
              }
            }
          } else {
#pragma unroll
            for (int n = 0; n < kScoreTiles; ++n) {
              score[n][2 * r] *= scale * kLog2e;
              score[n][2 * r + 1] *= scale * kLog2e;
            }
          }
          if (begins) {
            float best = top[r];
#pragma unroll
            for (int n = 0; n < kScoreTiles; ++n) {
              best = fmaxf(best, fmaxf(score[n][2 * r], score[n][2 * r + 1]));
            }
            best = quad_max(best);
            // 0 before the first finite score, when there is nothing to correct
            const float correction = exp2_approx(top[r] - (best == lowest ? 0.0f : best));
            top[r] = best;
            sum[r] *= correction;
            shift[r] *= correction;
#pragma unroll
            for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
              for (int c = 2 * r; c < 2 * r + 2; ++c) {
                out[n][c] *= correction;
                dout[n][c] *= correction;
              }
            }
          }
          const float base = top[r] == lowest ? 0.0f : top[r];
#pragma unroll
          for (int n = 0; n < kScoreTiles; ++n) {
            float e[2], product[2];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              e[c] = exp2_approx(score[n][2 * r + c] - base);
              product[c] = e[c] * (scale * dscore[n][2 * r + c]);
              if (begins) sum[r] += e[c];
              shift[r] += product[c];
            }
            weight[n / 2][n % 2 * 2 + r] = narrow_pair<E>(e[0], e[1]);
            dweight[n / 2][n % 2 * 2 + r] = narrow_pair<E>(product[0], product[1]);
          }
        }
      }

      copy_async_wait<0>();
      __syncthreads();  // the values have arrived, and nobody reads these keys any more
      if (j0 + kKeys < keys) load_keys(j0 + kKeys);
      if (own) {
#pragma unroll
        for (int kk = 0; kk < kKeys / 16; ++kk) {
          if (!kFull && j0 + 16 * kk >= own_keys) continue;
#pragma unroll
          for (int n = 0; n < kOutTiles; n += 4) {
            if (!kFull && 8 * n >= columns) continue;
            uint32_t value[2][4], dvalue[2][4];
#pragma unroll
            for (int u = 0; u < 2; ++u) {
              const int at = value_offset + kk * 16 * kWidePitch + (n + 2 * u) * 8;
              load_matrices_transposed(value[u], own_value + at);
              if (moves_value) load_matrices_transposed(dvalue[u], own_dvalue + at);
            }
            if (moves_q || moves_key) {
#pragma unroll
              for (int u = 0; u < 2; ++u) mma_pair<E>(dout[n + 2 * u], dout[n + 2 * u + 1], dweight[kk], value[u]);
            }
            if (begins) {
#pragma unroll
              for (int u = 0; u < 2; ++u) mma_pair<E>(out[n + 2 * u], out[n + 2 * u + 1], weight[kk], value[u]);
            }
            if (moves_value) {
#pragma unroll
              for (int u = 0; u < 2; ++u) mma_pair<E>(dout[n + 2 * u], dout[n + 2 * u + 1], weight[kk], dvalue[u]);
            }
          }
        }
      }
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (begins) {
        sum[r] = quad_sum(sum[r]);
        sum[r] = sum[r] == 0.0f ? 0.0f : 1.0f / sum[r];  // a row that attends to nothing: zeros
      }
      const float total = quad_sum(shift[r]) * sum[r];
      const int row = row0 + g + 8 * r;
      if (row < queries) {
        const int64_t at = (head0 + row) * p.width + column0 + 2 * t;
        if (begins && blockIdx.y == 0) {
          write_row<kOutTiles>(p.out + at, columns - 2 * t, pairs_out,
                               [&](int n, int c) { return out[n][2 * r + c] * sum[r]; });
        }
        write_row<kOutTiles>(p.dout + int64_t{i} * p.batch * p.heads * p.queries * p.width + at, columns - 2 * t,
                             pairs_out,
                             [&](int n, int c) { return (dout[n][2 * r + c] - total * out[n][2 * r + c]) * sum[r]; });
      }
    }
  }
}

template <int kKeys, int kWidth, bool kFull, int kDepth = 0, class E>
void launch_attention_mma_as(const AttentionProblem<E, E>& p, cudaStream_t stream) {
  const int depth = mma_depth(p);
  const int64_t most = shared_memory_of_device();
  // More queries in a block mean fewer reads of K, V and their tangents; few queries need no large block.
  int warps = kMostAttentionWarps;
  while (warps > 4 && (p.queries <= warps / 2 * kFragmentRows ||
                       static_cast<int64_t>(attention_mma_bytes(warps, depth, kKeys, kWidth)) > most)) {
    warps /= 2;
  }
  const int64_t blocks = p.batch * p.heads * ceil_div(p.queries, warps * kFragmentRows);
  const int64_t tiles = ceil_div(p.width, kWidth), group = attention_group(blocks * tiles, p.k, 1);
  const bool pairs_out = p.width % 2 == 0 && aligned16(p.out) && aligned16(p.dout);
  launch(attention_mma_kernel<E, kKeys, kWidth, kFull, kDepth>, dim3(blocks, ceil_div(p.k, group), tiles),
         dim3(warps * kWarp), attention_mma_bytes(warps, depth, kKeys, kWidth), stream, p, depth,
         static_cast<int>(group), pairs_out);
}

template <int kKeys, int kWidth, class E>
void launch_attention_mma(const AttentionProblem<E, E>& p, cudaStream_t stream) {
  if (p.dquery.data != nullptr && p.dkey.data != nullptr && p.dvalue.data != nullptr && p.width % kWidth == 0) {
    if (mma_depth(p) == kWidth) return launch_attention_mma_as<kKeys, kWidth, true, kWidth>(p, stream);
    launch_attention_mma_as<kKeys, kWidth, true>(p, stream);
  } else {
    launch_attention_mma_as<kKeys, kWidth, false>(p, stream);
  }
}

}  // namespace frog
