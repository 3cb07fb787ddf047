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

// store(r, d, sum over j of x[r][j] matrix[j][d]) for n <= kMaxRows rows, by the whole block of
// kThreads. x: shared, [n][dims], complete and visible. scratch: shared, not x.
template <int kThreads, int kMaxRows, typename Store>
__device__ __forceinline__ void transform_rows(const float* x, int n, const float* matrix, int dims,
                                               float* scratch, Store&& store) {
  const int thread = static_cast<int>(threadIdx.x);
  const int width = transform_width(dims), columns = dims / width;
  const int parts = transform_parts(kThreads, dims);
  for (int i = thread; i < parts * columns; i += kThreads) {
    const int part = i / columns, first = i % columns * width;
    float sums[kMaxRows][4] = {};
    const auto add = [&](int j, const float4& m) {
#pragma unroll
      for (int r = 0; r < kMaxRows; r++) {
        const float value = r < n ? x[r * dims + j] : 0.0f;
        sums[r][0] += value * m.x;
        sums[r][1] += value * m.y;
        sums[r][2] += value * m.z;
        sums[r][3] += value * m.w;
      }
    };
    if (width == 4) {
#pragma unroll 4
      for (int j = part; j < dims; j += parts) {
        add(j, *reinterpret_cast<const float4*>(matrix + j * dims + first));
      }
    } else {
      for (int j = part; j < dims; j += parts) {
        add(j, {matrix[j * dims + first], 0.0f, 0.0f, 0.0f});
      }
    }
#pragma unroll
    for (int r = 0; r < kMaxRows; r++) {
      if (r >= n) continue;
#pragma unroll
      for (int w = 0; w < 4; w++) {
        if (w < width) scratch[(part * n + r) * dims + first + w] = sums[r][w];
      }
    }
  }
  sync_block();
  for (int i = thread; i < n * dims; i += kThreads) {
    float sum = 0.0f;
    for (int part = 0; part < parts; part++) sum += scratch[part * n * dims + i];
    store(i / dims, i % dims, sum);
  }
}

// store(d, sum over j of x[j] matrix[d][j]), a warp a dim. x: shared, complete and visible.
template <int kThreads, typename Store>
__device__ __forceinline__ void transform_row_transposed(const float* x, const float* matrix,
                                                         int dims, Store&& store) {
  constexpr int kAtOnce = 4;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = lane_id();
  for (int first = warp * kAtOnce; first < dims; first += kThreads / kWarpSize * kAtOnce) {
    float sums[kAtOnce] = {};
#pragma unroll 2
    for (int j = lane; j < dims; j += kWarpSize) {
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) {
        const int d = first + i < dims ? first + i : dims - 1;
        sums[i] += x[j] * matrix[d * dims + j];
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
