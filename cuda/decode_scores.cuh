// The query side of the decode kernel: queries as B fragments, and the scores S^T = K Q^T of 16
// tokens. decode_attention.cuh says which lane owns what.
#pragma once

#include "cuda/device_ops.cuh"

namespace mustafar::cuda {

constexpr int kSetQueries = 4;  // query heads in the columns of one product

// The block's queries in shared memory, f32, the softmax's scale (base 2) in them, zeros past the
// last. A lane wants its own run of dims of its own query: the gaps put the 16 of a set (4 queries,
// 4 runs) into different banks. Read from global memory they cost a kernel half of its time, each
// of a warp's loads touching 16 lines.
template <int kDim>
constexpr int kQueryStride = kDim + 4;
template <int kDim, int kQueries>
constexpr int kQueryBytes = kQueries* kQueryStride<kDim> * 4;

__device__ __forceinline__ float softmax_scale(int head_dim) {
  return 1.44269504f / sqrtf(static_cast<float>(head_dim));
}

__device__ __forceinline__ int query_index(int dim) { return dim + dim / 32; }

// from: [n_queries][kDim]; by the whole block, a barrier must follow.
template <int kDim, int kQueries>
__device__ __forceinline__ void fetch_queries(const float* from, int n_queries, float* to) {
  const float scale = softmax_scale(kDim);
  for (int i = static_cast<int>(threadIdx.x); i < kQueries * kDim;
       i += static_cast<int>(blockDim.x)) {
    const int query = i / kDim, dim = i % kDim;
    to[query * kQueryStride<kDim> + query_index(dim)] = query < n_queries ? from[i] * scale : 0.0f;
  }
}

// The columns of a lane's query of a set: hi terms in 0-3, lo terms in 4-7. The block's queries lie
// kAt bytes into shared memory; nothing is kept in registers.
template <int kDim, int kAt>
struct Query {
  int set;

  __device__ __forceinline__ bool low() const { return lane_id() >= 4 * kSetQueries; }
  __device__ __forceinline__ float at(int dim) const {
    const int query = set * kSetQueries + (lane_id() >> 2) % kSetQueries;
    return reinterpret_cast<const float*>(shared_memory() +
                                          kAt)[query * kQueryStride<kDim> + query_index(dim)];
  }
};

// The same from global memory, for the order of dims of dense slots, where a load of a warp touches
// a line of each query, and stages leave no shared memory.
struct GlobalQuery {
  const float* values;  // [head_dim] of the query of column g, or null past the last query
  float scale;          // of the softmax, in base 2

  __device__ __forceinline__ bool low() const { return lane_id() >= 4 * kSetQueries; }
  __device__ __forceinline__ float at(int dim) const {
    return values != nullptr ? values[dim] * scale : 0.0f;
  }
};

// B fragments of S^T = K Q^T, 2-byte. dim_of(i, j, n): the dim of this lane in step i, register j,
// half n.
template <DType kType, typename Query, int kSteps, typename DimOf>
__device__ __forceinline__ void load_query(const Query& q, DimOf&& dim_of,
                                           uint32_t (&b)[kSteps][2]) {
#pragma unroll
  for (int i = 0; i < kSteps; i++) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float term[2];
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const float x = q.at(dim_of(i, j, n));
        const float high = half_float<kType>(static_cast<uint16_t>(pack2<kType>(x, 0.0f)));
        term[n] = q.low() ? x - high : high;
      }
      b[i][j] = pack2<kType>(term[0], term[1]);
    }
  }
}

// The same in int8, n being a byte. A query is scale * (128 high + low). Returns the scale of
// column g's query.
template <typename Query, int kSteps, typename DimOf>
__device__ __forceinline__ float load_query_int8(const Query& q, DimOf&& dim_of,
                                                 uint32_t (&b)[kSteps][2]) {
  float largest = 0.0f;
  for (int i = 0; i < 8 * kSteps; i++) {  // left to the compiler: registers are few here
    largest = fmaxf(largest, fabsf(q.at(dim_of(i / 8, i / 4 % 2, i % 4))));
  }
  largest = fmaxf(largest, shuffle_xor(largest, 1));
  largest = fmaxf(largest, shuffle_xor(largest, 2));
  const float scale = largest / 16256.0f;  // 127 * 128
  const float inverse = largest > 0.0f ? 16256.0f / largest : 0.0f;
#pragma unroll
  for (int i = 0; i < kSteps; i++) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      uint32_t word = 0;
#pragma unroll
      for (int n = 0; n < 4; n++) {
        const float x = fminf(fmaxf(rintf(q.at(dim_of(i, j, n)) * inverse), -16256.0f), 16256.0f);
        const int whole = static_cast<int>(x);
        const int high = (whole + 64) >> 7;
        const int term = q.low() ? whole - high * 128 : high;
        word |= (static_cast<uint32_t>(term) & 0xffu) << (8 * n);
      }
      b[i][j] = word;
    }
  }
  return scale;
}

// Dims of a 2-byte query where lane c owns kDims neighbours: step i multiplies four of them.
template <int kDims>
__device__ __forceinline__ int run_dim(int i, int j, int n) {
  return (lane_id() & 3) * kDims + 4 * i + 2 * j + n;
}

// Of queries 2c % 4 and the next, from the scale of column g's.
__device__ __forceinline__ void exchange_scales(float scale, float (&mine)[2]) {
#pragma unroll
  for (int n = 0; n < 2; n++) mine[n] = shuffle(scale, (2 * (lane_id() & 3) % 4 + n) * 4);
}

// Token of the 16 in fragment row g (row g + 8: eight later).
__device__ __forceinline__ int row_token(int g) { return (g >> 1) + 4 * (g & 1); }

// Adds the products of a query's two terms, which lie two lanes apart.
__device__ __forceinline__ void add_terms(float (&s)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) s[i] += shuffle_xor(s[i], 2);
}

// The same of int8 queries, as whole numbers in units of both scales.
__device__ __forceinline__ void add_terms(const int32_t (&acc)[4], float (&s)[4]) {
  const int weight = lane_id() & 2 ? 1 : 128;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int32_t term = acc[i] * weight;
    s[i] = static_cast<float>(term + shuffle_xor(term, 2));
  }
}

// Scores of a lane's two tokens: [2 j + n] is token row_token(g) + 8 j, query 2c % 4 + n.
template <DType kType, int kDims>
__device__ __forceinline__ void scores_2byte(const uint32_t (&rows)[2][kDims / 2],
                                             const uint32_t (&b)[kDims / 4][2], float (&s)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) s[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < kDims / 4; i++) {
    const uint32_t a[4] = {rows[0][2 * i], rows[1][2 * i], rows[0][2 * i + 1], rows[1][2 * i + 1]};
    mma_16x8x16<kType>(s, a, b[i]);
  }
  add_terms(s);
}

// The same for int8 codes.
template <int kDims>
__device__ __forceinline__ void scores_int8(const uint32_t (&rows)[2][kDims / 4],
                                            const uint32_t (&b)[kDims / 8][2], float (&s)[4]) {
  int32_t acc[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < kDims / 8; i++) {
    const uint32_t a[4] = {rows[0][2 * i], rows[1][2 * i], rows[0][2 * i + 1], rows[1][2 * i + 1]};
    mma_16x8x32_s8(acc, a, b[i]);
  }
  add_terms(acc, s);
}

// Scores of codes in their scales: k_scale and v_scale of the lane's two tokens, q_scale of its two
// queries. log_scale: of v_scale, in base 2.
template <int kSets>
__device__ __forceinline__ void scale_scores(const float (&k_scale)[2], const float (&v_scale)[2],
                                             const float (&q_scale)[kSets][2],
                                             float (&scores)[kSets][4], float (&log_scale)[2]) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
#pragma unroll
    for (int set = 0; set < kSets; set++) {
      scores[set][2 * r] *= k_scale[r] * q_scale[set][0];
      scores[set][2 * r + 1] *= k_scale[r] * q_scale[set][1];
    }
    // A row of zeros has scale 0: any small one keeps the logarithm finite.
    log_scale[r] = log2_approx(fmaxf(v_scale[r], 0x1p-60f));
  }
}

}  // namespace mustafar::cuda
