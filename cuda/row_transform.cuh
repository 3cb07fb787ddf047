// Rows times the matrices of a KV transform: a few rows in the kernels of a decode step, where the
// matrix is read once and latency counts, and 32 rows a block in prefill, where it is shared.
#pragma once

#include "cuda/device_ops.cuh"

namespace mustafar::cuda {

// ---- a few rows ----

// Columns of a matrix that a thread takes, and threads that split its rows.
__device__ __forceinline__ int transform_width(int dims) { return dims % 4 == 0 ? 4 : 1; }
MUSTAFAR_HOST_DEVICE constexpr int transform_parts(int threads, int dims) {
  const int columns = dims % 4 == 0 ? dims / 4 : dims;
  return threads < columns ? 1 : threads / columns;
}

// Floats of shared memory that transform_rows takes.
MUSTAFAR_HOST_DEVICE constexpr int transform_scratch(int threads, int n, int dims) {
  return transform_parts(threads, dims) * n * dims;
}

// The sums of a thread's columns over its rows of the matrix, to scratch.
template <int kWidth, int kMaxRows>
__device__ __forceinline__ void transform_part(const float* x, int n, const float* matrix, int dims,
                                               int part, int parts, int first, float* scratch) {
  float sums[kMaxRows][kWidth] = {};
#pragma unroll 4
  for (int j = part; j < dims; j += parts) {
    float m[kWidth];
    if constexpr (kWidth == 4) {
      const float4 four = *reinterpret_cast<const float4*>(matrix + j * dims + first);
      m[0] = four.x;
      m[1] = four.y;
      m[2] = four.z;
      m[3] = four.w;
    } else {
      m[0] = matrix[j * dims + first];
    }
#pragma unroll
    for (int r = 0; r < kMaxRows; r++) {
      const float value = x[(r < n ? r : 0) * dims + j];
#pragma unroll
      for (int w = 0; w < kWidth; w++) sums[r][w] += value * m[w];
    }
  }
#pragma unroll
  for (int r = 0; r < kMaxRows; r++) {
    if (r >= n) continue;
#pragma unroll
    for (int w = 0; w < kWidth; w++) scratch[(part * n + r) * dims + first + w] = sums[r][w];
  }
}

// store(r, d, sum over j of x[r][j] matrix[j][d]) for n <= kMaxRows rows, by the whole block of
// kThreads. x: shared, [n][dims], complete and visible. scratch: shared, not x.
template <int kThreads, int kMaxRows, typename Store>
__device__ __forceinline__ void transform_rows(const float* x, int n, const float* matrix, int dims,
                                               float* scratch, Store&& store) {
  const int thread = static_cast<int>(threadIdx.x);
  const int columns = dims / transform_width(dims);
  const int parts = transform_parts(kThreads, dims);
#pragma unroll 1
  for (int i = thread; i < parts * columns; i += kThreads) {
    const int part = i / columns, column = i % columns;
    if (dims % 4 == 0) {
      transform_part<4, kMaxRows>(x, n, matrix, dims, part, parts, 4 * column, scratch);
    } else {
      transform_part<1, kMaxRows>(x, n, matrix, dims, part, parts, column, scratch);
    }
  }
  sync_block();
#pragma unroll 1
  for (int i = thread; i < n * dims; i += kThreads) {
    float sum = 0.0f;
#pragma unroll 4
    for (int part = 0; part < parts; part++) sum += scratch[part * n * dims + i];
    store(i / dims, i % dims, sum);
  }
}

// store(d, sum over j of x[j] matrix[d][j]), a warp a dim. x: shared, complete and visible.
template <int kThreads, typename Store>
__device__ __forceinline__ void transform_row_transposed(const float* x, const float* matrix,
                                                         int dims, Store&& store) {
  constexpr int kAtOnce = 8;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = lane_id();
  const int width = transform_width(dims);
  for (int first = warp * kAtOnce; first < dims; first += kThreads / kWarpSize * kAtOnce) {
    float sums[kAtOnce] = {};
    for (int j = lane * width; j < dims; j += kWarpSize * width) {
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) {
        const float* const row = matrix + (first + i < dims ? first + i : dims - 1) * dims + j;
        if (width == 4) {
          const float4 m = *reinterpret_cast<const float4*>(row);
          sums[i] += x[j] * m.x + x[j + 1] * m.y + x[j + 2] * m.z + x[j + 3] * m.w;
        } else {
          sums[i] += x[j] * row[0];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      const float sum = warp_sum(sums[i]);
      if (lane == 0 && first + i < dims) store(first + i, sum);
    }
  }
}

// ---- 32 rows a block ----

constexpr int kBlockRows = 32;
constexpr int kBlockThreads = 256;

// Floats of shared memory: rows [kBlockRows][dims], then a slab of the matrix.
MUSTAFAR_HOST_DEVICE constexpr int transform_block_floats(int dims) {
  return kBlockRows * dims + dims * (kBlockRows + 1);
}

// store(r, d, row r of x times the matrix, or its transpose) for kBlockRows rows of 32 kTiles dims.
// x: shared as above, complete and visible; the slab follows it. A thread has dims lane + 32 i of
// rows warp + 8 k.
template <int kTiles, bool kTransposed, typename Store>
__device__ __forceinline__ void transform_block(const float* x, const float* matrix,
                                                Store&& store) {
  constexpr int kDims = 32 * kTiles, kWarps = kBlockThreads / kWarpSize,
                kRows = kBlockRows / kWarps;
  constexpr int kStride = kTransposed ? 33 : kDims;  // of the slab's rows
  float* const slab = const_cast<float*>(x) + kBlockRows * kDims;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = lane_id();
  float sums[kRows][kTiles] = {};
#pragma unroll 1
  for (int first = 0; first < kDims; first += 32) {
    sync_block();  // all are done with the slab before
    for (int i = thread; i < 32 * kDims; i += kBlockThreads) {
      if constexpr (kTransposed) {  // matrix[d][first + j] at [d][j]
        slab[i / 32 * kStride + i % 32] = matrix[i / 32 * kDims + first + i % 32];
      } else {
        slab[i] = matrix[first * kDims + i];
      }
    }
    sync_block();
#pragma unroll 8
    for (int j = 0; j < 32; j++) {
      float m[kTiles];
#pragma unroll
      for (int t = 0; t < kTiles; t++) {
        const int d = lane + 32 * t;
        m[t] = kTransposed ? slab[d * kStride + j] : slab[j * kStride + d];
      }
#pragma unroll
      for (int k = 0; k < kRows; k++) {
        const float value = x[(warp + kWarps * k) * kDims + first + j];
#pragma unroll
        for (int t = 0; t < kTiles; t++) sums[k][t] += value * m[t];
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kRows; k++) {
#pragma unroll
    for (int t = 0; t < kTiles; t++) store(warp + kWarps * k, lane + 32 * t, sums[k][t]);
  }
}

}  // namespace mustafar::cuda
