// Rows times the matrices of a KV transform: a few rows in f32, where a matrix is read once and
// latency counts, and many rows a block on tensor cores, where they share it.
#pragma once

#include "backend/cache_view.h"
#include "cuda/device_ops.cuh"
#include "cuda/matrix_ops.cuh"

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

// ---- many rows a block ----

constexpr int kBlockThreads = 256;

// Rows of a batch, each times a matrix of its own, on tensor cores: values and matrices are taken
// as two bf16 terms each, of whose four products three count, which is within 2^-16 of every term.
// A matrix that several rows share is read once. In shared memory. Row: has a `matrix`, null where
// it takes part in no product. kDims: a multiple of 16; kRows: likewise.
template <typename Row, int kDims, int kRows>
class RowBlock {
 public:
  // row_of(r), of the first n rows. By the whole block, once; ends with a barrier.
  template <typename RowOf>
  __device__ __forceinline__ void fill(int n, RowOf&& row_of) {
    const int thread = static_cast<int>(threadIdx.x);
    for (int r = thread; r < kRows; r += kBlockThreads) rows_[r] = r < n ? row_of(r) : Row();
    sync_block();
    if (thread >= kLeaderWords * kWarpSize) return;
    bool leads = thread < kRows && rows_[thread].matrix != nullptr;
    for (int r = thread - 1; leads && r >= 0; r--) leads = rows_[r].matrix != rows_[thread].matrix;
    const uint32_t leaders = ballot(leads);
    if (lane_id() == 0) leaders_[thread / kWarpSize] = leaders;
  }

  __device__ __forceinline__ const Row& operator[](int r) const { return rows_[r]; }

  // Dim d of row r as it is to be multiplied: multiply() takes what was put before a barrier.
  __device__ __forceinline__ void put(int r, int d, float value) {
    const uint32_t high = pack2<DType::kBF16>(value, 0.0f) & 0xffffu;
    terms_[0][r][d] = static_cast<uint16_t>(high);
    terms_[1][r][d] =
        static_cast<uint16_t>(pack2<DType::kBF16>(value - bits_float(high << 16), 0.0f));
  }
  // Dims d to d + 3, d a multiple of 4.
  __device__ __forceinline__ void put_four(int r, int d, const float4& values) {
    uint2 high, low;
    split(values.x, values.y, high.x, low.x);
    split(values.z, values.w, high.y, low.y);
    *reinterpret_cast<uint2*>(&terms_[0][r][d]) = high;
    *reinterpret_cast<uint2*>(&terms_[1][r][d]) = low;
  }

  // Instead: dim d of a row without a matrix as it is, for kept() after a barrier.
  __device__ __forceinline__ void keep(int r, int d, float value) {
    terms_[0][r][d] = static_cast<uint16_t>(float_bits(value) >> 16);
    terms_[1][r][d] = static_cast<uint16_t>(float_bits(value));
  }
  __device__ __forceinline__ float kept(int r, int d) const {
    return bits_float(uint32_t{terms_[0][r][d]} << 16 | terms_[1][r][d]);
  }

  // store(r, d, values of dims d and d + 1) of row r times its matrix, or its transpose, of those
  // of the first n rows that have one. By the whole block, after a barrier.
  template <bool kTransposed, typename Store>
  __device__ __forceinline__ void multiply(int n, Store&& store) const {
#pragma unroll 1
    for (int word = 0; word < kLeaderWords; word++) {
#pragma unroll 1
      for (uint32_t left = leaders_[word]; left != 0; left &= left - 1) {
        const int leader = word * kWarpSize + popcount((left & (0u - left)) - 1u);
        multiply_by<kTransposed>(n, rows_[leader].matrix, store);
      }
    }
  }

 private:
  static constexpr int kWarps = kBlockThreads / kWarpSize;
  static constexpr int kColumnTiles = kDims / 8, kSteps = kDims / 16;
  static constexpr int kWarpTiles = (kColumnTiles + kWarps - 1) / kWarps;
  static_assert(kDims % 16 == 0 && kRows % 16 == 0 && kColumnTiles % kWarpTiles == 0);

  // Two neighbours as two terms each.
  static __device__ __forceinline__ void split(float a, float b, uint32_t& high, uint32_t& low) {
    high = pack2<DType::kBF16>(a, b);
    low = pack2<DType::kBF16>(a - bf16_float(static_cast<uint16_t>(high)),
                              b - bf16_float(static_cast<uint16_t>(high >> 16)));
  }

  template <bool kTransposed, typename Store>
  __device__ __forceinline__ void multiply_by(int n, const float* matrix, Store&& store) const {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = lane_id();
    const int g = lane >> 2, c = lane & 3, first_tile = warp * kWarpTiles;
    if (first_tile >= kColumnTiles) return;
    uint32_t b[kWarpTiles][kSteps][2][2];  // of a step of 16 dims: terms, halves
#pragma unroll
    for (int t = 0; t < kWarpTiles; t++) {
      const int d = 8 * (first_tile + t) + g;
#pragma unroll
      for (int k = 0; k < kSteps; k++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int j = 16 * k + 8 * half + 2 * c;
          const float* const at = kTransposed ? matrix + d * kDims + j : matrix + j * kDims + d;
          split(at[0], at[kTransposed ? 1 : kDims], b[t][k][0][half], b[t][k][1][half]);
        }
      }
    }
    const int row = lane & 15, column = (lane >> 4) * 8;  // of which the lane gives the address
#pragma unroll 1
    for (int first = 0; first < n; first += 16) {
      float sums[kWarpTiles][4] = {};
#pragma unroll
      for (int k = 0; k < kSteps; k++) {
        uint32_t high[4], low[4];
        load_matrices<false>(high, &terms_[0][first + row][16 * k + column]);
        load_matrices<false>(low, &terms_[1][first + row][16 * k + column]);
#pragma unroll
        for (int t = 0; t < kWarpTiles; t++) {
          mma_16x8x16<DType::kBF16>(sums[t], low, b[t][k][0]);
          mma_16x8x16<DType::kBF16>(sums[t], high, b[t][k][1]);
          mma_16x8x16<DType::kBF16>(sums[t], high, b[t][k][0]);
        }
      }
#pragma unroll
      for (int t = 0; t < kWarpTiles; t++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int r = first + g + 8 * half;
          if (rows_[r].matrix != matrix) continue;
          store(r, 8 * (first_tile + t) + 2 * c, sums[t][2 * half], sums[t][2 * half + 1]);
        }
      }
    }
  }

  static constexpr int kLeaderWords = (kRows + kWarpSize - 1) / kWarpSize;

  Row rows_[kRows];
  uint32_t leaders_[kLeaderWords];  // rows that are the first with their matrix
  // Rows 16 bytes longer than a multiple of 32 dims: ldmatrix meets no bank conflict.
  alignas(16) uint16_t terms_[2][kRows][kDims + 8];
};

}  // namespace mustafar::cuda
