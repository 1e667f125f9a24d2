// attention_jvp on CUDA cores: out = softmax(scale Q K^T + mask) V and its k tangents, one pass over the keys for a
// block of queries, online softmax, L x S never in memory. csrc/cpu/attention.cpp says what is computed.
//
// Floor: 2 products of L x S x D multiply-adds for the primal and 4 for each tangent (dQ K^T, Q dK^T, (P dS) V, P dV);
// the bytes of the operands are far below that from L = 64 on.
//
// A block holds out and the dout of kChunk tangents of 64 queries in registers; more do not fit. It goes over the keys
// once for each chunk of its tangents. The first time it finds maximum, sum and out with a running maximum; from then
// on they are known, and a chunk computes only Q K^T and exp() again: 4 + 1 / kChunk products for a tangent instead of
// 4. The other way, a loop over the chunks inside the loop over the keys, would keep k * 64 * D sums in shared memory:
// 256 KiB at k = 16 and D = 64, more than there is, and fewer queries in a block mean as much more reading of K, V and
// their tangents.
// Where there are fewer blocks of queries than the device can run, the tangents are divided among several blocks.
//
// Layout: 256 threads, 16 x 16; each has 4 rows, 16 apart, so that the 16 threads of a row are half a warp, and maximum
// and sums of a row are a few shuffles. Operands come in slices of 8 columns (of Q, K and their tangents) or 8 keys (of
// V and its tangents), as they are, by asynchronous copies, one slice ahead of the arithmetic. 16 bytes that a thread
// reads from shared memory serve 13 multiply-adds where kChunk is 2 and kKeys 64.
#pragma once

#include "attention_problem.cuh"

namespace frog {

constexpr int kAttentionThreads = 256;
constexpr int kAttentionRows = 64;  // queries of a block
constexpr int kAttentionSlice = 8;  // columns or keys that are in shared memory at a time
constexpr int kLanesOfRow = 16;

/// Bytes from row to row of a slice: an odd multiple of 16, or 16 itself, so that 8 threads with 8 rows do not collide.
template <class T>
constexpr int kSlicePitch = sizeof(T) == 2 ? 16 : kAttentionSlice * static_cast<int>(sizeof(T)) + 16;

/// Shared memory of attention_kernel, and where its parts lie. A slice is that of the scores or that of the values.
template <class T, class D, int kKeys, int kChunk, int kWidth>
struct AttentionShared {
  using S = typename Compute<T>::type;
  static constexpr int kProbabilityPitch = kKeys + 16 / static_cast<int>(sizeof(S));
  static constexpr int kQuery = 0, kDquery = kQuery + kAttentionRows * kSlicePitch<T>,
                       kKey = kDquery + kChunk * kAttentionRows * kSlicePitch<D>, kDkey = kKey + kKeys * kSlicePitch<T>,
                       kScores = kDkey + kChunk * kKeys * kSlicePitch<D>;
  static constexpr int kValue = 0, kDvalue = kValue + kAttentionSlice * kWidth * static_cast<int>(sizeof(T)),
                       kValues = kDvalue + kChunk * kAttentionSlice * kWidth * static_cast<int>(sizeof(D));
  static constexpr int kSliceBytes = kScores > kValues ? kScores : kValues;
  static constexpr size_t kProbabilities = 2 * kSliceBytes;
  static constexpr size_t kBytes = kProbabilities + (1 + kChunk) * kAttentionRows * kProbabilityPitch * sizeof(S);
  static_assert(kBytes <= 99 * 1024, "what every device since sm_80 has");
};

// rows x columns elements from `from`, zeros where there are none, into shared memory at `pitch` bytes a row.
template <int kRows, int kColumns, int kPitch, class T>
__device__ __forceinline__ void load_slice(unsigned char* shared, const T* from, int64_t stride, int rows, int columns,
                                           bool packs) {
  constexpr int kPacks = kColumns / kPack<T>;
  for (int e = static_cast<int>(threadIdx.x); e < kRows * kPacks; e += kAttentionThreads) {
    const int r = e / kPacks, c = e % kPacks * kPack<T>;
    unsigned char* const to = shared + r * kPitch + c * static_cast<int>(sizeof(T));
    const T* const source = from + r * stride + c;
    if (packs && (r >= rows || c >= columns || c + kPack<T> <= columns)) {
      const bool inside = r < rows && c < columns;
      copy_async16(to, inside ? source : from, inside);
    } else {
#pragma unroll 1  // rarely taken, and registers are short
      for (int j = 0; j < kPack<T>; ++j) {
        reinterpret_cast<T*>(to)[j] = r < rows && c + j < columns ? source[j] : T{};
      }
    }
  }
}

// N neighbours from shared memory in the type of the arithmetic.
template <int N, class T, class S>
__device__ __forceinline__ void read(const unsigned char* from, S* to) {
  constexpr int kAtOnce = kPack<T> < N ? kPack<T> : N;
#pragma unroll
  for (int part = 0; part < N; part += kAtOnce) {
    const auto pack = reinterpret_cast<const Pack<T, kAtOnce>*>(from)[part / kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) to[part + j] = widen(pack.at[j]);
  }
}

template <class S>
__device__ __forceinline__ S row_sum(S value) {
#pragma unroll
  for (int step = kLanesOfRow / 2; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
  return value;
}
template <class S>
__device__ __forceinline__ S row_max(S value) {
#pragma unroll
  for (int step = kLanesOfRow / 2; step > 0; step /= 2) {
    const S other = __shfl_xor_sync(kFullWarp, value, step);
    value = other > value ? other : value;
  }
  return value;
}

// Four neighbouring elements of a row of which `left` exist; `packs`: rows are multiples of four elements.
template <class T, class S>
__device__ __forceinline__ void write4(T* to, const S* values, int left, bool packs) {
  constexpr int kAtOnce = kPack<T> < 4 ? kPack<T> : 4;
  if (packs && left >= 4) {
#pragma unroll
    for (int part = 0; part < 4; part += kAtOnce) {
      Pack<T, kAtOnce> pack;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) pack.at[j] = narrow<T>(values[part + j]);
      reinterpret_cast<Pack<T, kAtOnce>*>(to)[part / kAtOnce] = pack;
    }
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < left) to[j] = narrow<T>(values[j]);
    }
  }
}

// grid (B * H * blocks of queries, groups of tangents, blocks of kWidth columns); `per_group` tangents, a multiple of
// kChunk.
template <class T, class D, int kKeys, int kChunk, int kWidth>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_kernel(const AttentionProblem<T, D> p, int per_group, bool packs_out) {
  using S = typename Compute<T>::type;
  using Shared = AttentionShared<T, D, kKeys, kChunk, kWidth>;
  constexpr int kOwn = kAttentionRows / kLanesOfRow, kCols = kKeys / kLanesOfRow, kParts = kWidth / 64;
  constexpr int kPitch = Shared::kProbabilityPitch, kStep = kPack<S>;
  FROG_SHARED(unsigned char, shared);
  S* const probabilities = reinterpret_cast<S*>(shared + Shared::kProbabilities);  // [1 + kChunk, rows, kPitch]
  const int x = static_cast<int>(threadIdx.x) % kLanesOfRow, y = static_cast<int>(threadIdx.x) / kLanesOfRow;

  const int queries = static_cast<int>(p.queries), all_keys = static_cast<int>(p.keys);
  const int depth = static_cast<int>(p.depth), query_blocks = (queries + kAttentionRows - 1) / kAttentionRows;
  const int64_t b = blockIdx.x / query_blocks / p.heads, h = blockIdx.x / query_blocks % p.heads;
  const int64_t hkv = h / (p.heads / p.kv_heads);
  // With a causal mask the last blocks have most to do, so they begin.
  const int q0 = (query_blocks - 1 - static_cast<int>(blockIdx.x % query_blocks)) * kAttentionRows;
  const int column0 = static_cast<int>(blockIdx.z) * kWidth, columns = static_cast<int>(p.width) - column0;
  const int keys = p.causal && q0 + kAttentionRows < all_keys ? q0 + kAttentionRows : all_keys;
  const bool scores_move = p.dquery.data != nullptr || p.dkey.data != nullptr;
  const S scale = static_cast<S>(p.scale), lowest = -static_cast<S>(INFINITY);
  const T* const query = p.query.at(0, b, h) + q0 * p.query.row;
  const T* const key = p.key.at(0, b, hkv);
  const T* const value = p.value.at(0, b, hkv) + column0;
  const int64_t mask0 = b * p.mask.batch + h * p.mask.head;

  S top[kOwn], sum[kOwn];       // of a row; the sum over this thread's columns only
  S out[kOwn][kParts][4] = {};  // rows y + 16 i, columns 64 part + 4 x + ..
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    top[i] = lowest;
    sum[i] = 0;
  }

  int buffer = 0;
  const int from = static_cast<int>(blockIdx.y) * per_group, k_all = static_cast<int>(p.k);
  const int to = k_all - from < per_group ? k_all : from + per_group;
  for (int first = from; first < to; first += kChunk) {
    const bool begins = first == from;
    const int chunk = to - first < kChunk ? to - first : kChunk;
    S dout[kChunk][kOwn][kParts][4] = {}, shift[kChunk][kOwn] = {};

    const auto load_depth = [&](int j0, int c) {
      unsigned char* const at = shared + buffer * Shared::kSliceBytes;
      const int rows = queries - q0, left = all_keys - j0;
      load_slice<kAttentionRows, kAttentionSlice, kSlicePitch<T>>(at + Shared::kQuery, query + c, p.query.row, rows,
                                                                  depth - c, p.query.packs);
      load_slice<kKeys, kAttentionSlice, kSlicePitch<T>>(at + Shared::kKey, key + j0 * p.key.row + c, p.key.row, left,
                                                         depth - c, p.key.packs);
#pragma unroll 1
      for (int i = 0; i < chunk; ++i) {
        if (p.dquery.data != nullptr) {
          load_slice<kAttentionRows, kAttentionSlice, kSlicePitch<D>>(
              at + Shared::kDquery + i * kAttentionRows * kSlicePitch<D>,
              p.dquery.at(first + i, b, h) + q0 * p.dquery.row + c, p.dquery.row, rows, depth - c, p.dquery.packs);
        }
        if (p.dkey.data != nullptr) {
          load_slice<kKeys, kAttentionSlice, kSlicePitch<D>>(at + Shared::kDkey + i * kKeys * kSlicePitch<D>,
                                                             p.dkey.at(first + i, b, hkv) + j0 * p.dkey.row + c,
                                                             p.dkey.row, left, depth - c, p.dkey.packs);
        }
      }
      copy_async_commit();
    };
    const auto load_values = [&](int j) {
      unsigned char* const at = shared + buffer * Shared::kSliceBytes;
      const int left = all_keys - j;
      load_slice<kAttentionSlice, kWidth, kWidth * sizeof(T)>(at + Shared::kValue, value + j * p.value.row, p.value.row,
                                                              left, columns, p.value.packs);
#pragma unroll 1
      for (int i = 0; i < chunk && p.dvalue.data != nullptr; ++i) {
        load_slice<kAttentionSlice, kWidth, kWidth * sizeof(D)>(
            at + Shared::kDvalue + i * kAttentionSlice * kWidth * static_cast<int>(sizeof(D)),
            p.dvalue.at(first + i, b, hkv) + j * p.dvalue.row + column0, p.dvalue.row, left, columns, p.dvalue.packs);
      }
      copy_async_commit();
    };

    if (keys > 0) load_depth(0, 0);
    for (int j0 = 0; j0 < keys; j0 += kKeys) {
      const int end = j0 + kKeys < keys ? j0 + kKeys : keys;
      S score[kOwn][kCols] = {}, dscore[kChunk][kOwn][kCols] = {};  // rows y + 16 i, keys x + 16 j
      for (int c0 = 0; c0 < depth; c0 += kAttentionSlice) {
        copy_async_wait<0>();
        __syncthreads();  // the slice has arrived, and nobody reads the other buffer any more
        const unsigned char* const at = shared + buffer * Shared::kSliceBytes;
        buffer ^= 1;
        if (c0 + kAttentionSlice < depth) {
          load_depth(j0, c0 + kAttentionSlice);
        } else {
          load_values(j0);
        }
#pragma unroll 1
        for (int c = 0; c < kAttentionSlice; c += kStep) {
          S q[kOwn][kStep], k[kCols][kStep];
          const int offset = c * static_cast<int>(sizeof(T)), doffset = c * static_cast<int>(sizeof(D));
#pragma unroll
          for (int i = 0; i < kOwn; ++i) {
            read<kStep, T>(at + Shared::kQuery + (y + kLanesOfRow * i) * kSlicePitch<T> + offset, q[i]);
          }
#pragma unroll
          for (int j = 0; j < kCols; ++j) {
            read<kStep, T>(at + Shared::kKey + (x + kLanesOfRow * j) * kSlicePitch<T> + offset, k[j]);
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
#pragma unroll
              for (int u = 0; u < kStep; ++u) score[i][j] += q[i][u] * k[j][u];
            }
          }
#pragma unroll
          for (int t = 0; t < kChunk; ++t) {
            if (p.dquery.data != nullptr && t < chunk) {
#pragma unroll
              for (int i = 0; i < kOwn; ++i) {
                S moved[kStep];
                read<kStep, D>(
                    at + Shared::kDquery + (t * kAttentionRows + y + kLanesOfRow * i) * kSlicePitch<D> + doffset,
                    moved);
#pragma unroll
                for (int j = 0; j < kCols; ++j) {
#pragma unroll
                  for (int u = 0; u < kStep; ++u) dscore[t][i][j] += moved[u] * k[j][u];
                }
              }
            }
            if (p.dkey.data != nullptr && t < chunk) {
#pragma unroll
              for (int j = 0; j < kCols; ++j) {
                S moved[kStep];
                read<kStep, D>(at + Shared::kDkey + (t * kKeys + x + kLanesOfRow * j) * kSlicePitch<D> + doffset,
                               moved);
#pragma unroll
                for (int i = 0; i < kOwn; ++i) {
#pragma unroll
                  for (int u = 0; u < kStep; ++u) dscore[t][i][j] += q[i][u] * moved[u];
                }
              }
            }
          }
        }
      }

#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int row = q0 + y + kLanesOfRow * i;
#pragma unroll
        for (int j = 0; j < kCols; ++j) {
          const int column = j0 + x + kLanesOfRow * j;
          S& s = score[i][j];
          s *= scale;
          if (column >= all_keys || (p.causal && column > row)) {
            s = lowest;
          } else if (row < queries) {
            s = masked_score(s, p.mask, mask0 + row * p.mask.row + column * p.mask.column);
          }
        }
        if (begins) {
          S best = top[i];
#pragma unroll
          for (int j = 0; j < kCols; ++j) best = score[i][j] > best ? score[i][j] : best;
          best = row_max(best);
          // 0 before the first finite score, when there is nothing to correct
          const S correction = exp(top[i] - (best == lowest ? S(0) : best));
          top[i] = best;
          sum[i] *= correction;
#pragma unroll
          for (int t = 0; t < kChunk; ++t) shift[t][i] *= correction;
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
#pragma unroll
            for (int u = 0; u < 4; ++u) {
              out[i][part][u] *= correction;
#pragma unroll
              for (int t = 0; t < kChunk; ++t) dout[t][i][part][u] *= correction;
            }
          }
        }
        const S base = top[i] == lowest ? S(0) : top[i];
        S* const own = probabilities + (y + kLanesOfRow * i) * kPitch + x;
#pragma unroll
        for (int j = 0; j < kCols; ++j) {
          const S e = exp(score[i][j] - base);
          if (begins) sum[i] += e;
          own[kLanesOfRow * j] = e;
#pragma unroll
          for (int t = 0; t < kChunk; ++t) {
            const S product = e * (scale * dscore[t][i][j]);
            shift[t][i] += product;
            own[(1 + t) * kAttentionRows * kPitch + kLanesOfRow * j] = product;
          }
        }
      }
      for (int j = j0; j < end; j += kAttentionSlice) {
        copy_async_wait<0>();
        __syncthreads();
        const unsigned char* const at = shared + buffer * Shared::kSliceBytes;
        buffer ^= 1;
        if (j + kAttentionSlice < end) {
          load_values(j + kAttentionSlice);
        } else if (end < keys) {
          load_depth(end, 0);
        }
#pragma unroll 1
        for (int c = 0; c < kAttentionSlice; c += kStep) {
          const S* const own = probabilities + y * kPitch + (j - j0) + c;
          S e[kOwn][kStep], v[kStep][kParts][4];
#pragma unroll
          for (int i = 0; i < kOwn; ++i) {
            read<kStep, S>(reinterpret_cast<const unsigned char*>(own + kLanesOfRow * i * kPitch), e[i]);
          }
#pragma unroll
          for (int u = 0; u < kStep; ++u) {
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
              const int column = (c + u) * kWidth + 64 * part + 4 * x;
              read<4, T>(at + Shared::kValue + column * static_cast<int>(sizeof(T)), v[u][part]);
              if (begins) {
#pragma unroll
                for (int i = 0; i < kOwn; ++i) {
#pragma unroll
                  for (int w = 0; w < 4; ++w) out[i][part][w] += e[i][u] * v[u][part][w];
                }
              }
            }
          }
#pragma unroll
          for (int t = 0; t < kChunk; ++t) {
            if (scores_move && t < chunk) {
#pragma unroll
              for (int i = 0; i < kOwn; ++i) {
                S moved[kStep];
                read<kStep, S>(
                    reinterpret_cast<const unsigned char*>(own + ((1 + t) * kAttentionRows + kLanesOfRow * i) * kPitch),
                    moved);
#pragma unroll
                for (int part = 0; part < kParts; ++part) {
#pragma unroll
                  for (int w = 0; w < 4; ++w) {
#pragma unroll
                    for (int u = 0; u < kStep; ++u) dout[t][i][part][w] += moved[u] * v[u][part][w];
                  }
                }
              }
            }
            if (p.dvalue.data != nullptr && t < chunk) {
#pragma unroll
              for (int u = 0; u < kStep; ++u) {
#pragma unroll
                for (int part = 0; part < kParts; ++part) {
                  S moved[4];
                  const int column = (t * kAttentionSlice + c + u) * kWidth + 64 * part + 4 * x;
                  read<4, D>(at + Shared::kDvalue + column * static_cast<int>(sizeof(D)), moved);
#pragma unroll
                  for (int i = 0; i < kOwn; ++i) {
#pragma unroll
                    for (int w = 0; w < 4; ++w) dout[t][i][part][w] += e[i][u] * moved[w];
                  }
                }
              }
            }
          }
        }
      }
    }

#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int row = q0 + y + kLanesOfRow * i;
      const int64_t at = ((b * p.heads + h) * p.queries + row) * p.width + column0 + 4 * x;
      if (begins) {
        sum[i] = row_sum(sum[i]);
        sum[i] = sum[i] == S(0) ? S(0) : S(1) / sum[i];  // a row that attends to nothing: zeros
      }
      if (begins && blockIdx.y == 0 && row < queries) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          S own[4];
#pragma unroll
          for (int u = 0; u < 4; ++u) own[u] = out[i][part][u] * sum[i];
          write4(p.out + at + 64 * part, own, columns - 64 * part - 4 * x, packs_out);
        }
      }
#pragma unroll
      for (int t = 0; t < kChunk; ++t) {
        const S total = row_sum(shift[t][i]) * sum[i];
        if (t < chunk && row < queries) {
          D* const target = p.dout + int64_t{first + t} * p.batch * p.heads * p.queries * p.width + at;
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            S moved[4];
#pragma unroll
            for (int u = 0; u < 4; ++u) moved[u] = (dout[t][i][part][u] - total * out[i][part][u]) * sum[i];
            write4(target + 64 * part, moved, columns - 64 * part - 4 * x, packs_out);
          }
        }
      }
    }
  }
}

template <int kKeys, int kChunk, int kWidth, class T, class D>
void launch_attention_as(const AttentionProblem<T, D>& p, cudaStream_t stream) {
  const int64_t blocks = p.batch * p.heads * ceil_div(p.queries, kAttentionRows), tiles = ceil_div(p.width, kWidth);
  const int64_t group = attention_group(blocks * tiles, p.k, kChunk);
  const bool packs_out = p.width % 4 == 0 && aligned16(p.out) && aligned16(p.dout);
  launch(attention_kernel<T, D, kKeys, kChunk, kWidth>, dim3(blocks, ceil_div(p.k, group), tiles),
         dim3(kAttentionThreads), AttentionShared<T, D, kKeys, kChunk, kWidth>::kBytes, stream, p,
         static_cast<int>(group), packs_out);
}

}  // namespace frog
