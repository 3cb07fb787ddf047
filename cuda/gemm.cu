// y = W x for many rows of x on the tensor cores: the fallback where cuBLASLt is not found.
//
// Grid: x tiles of 64 output rows, y tiles of 64 rows of x; 4 warps as 2 x 2, each 32 x 32 of the
// tile as 2 x 4 products of 16x8x16. W and x go through shared memory in slices of 32 columns, two
// stages by cp.async; rows there are 40 values apart, which keeps ldmatrix free of bank conflicts.
// Rows past an edge repeat the last one and are not stored; columns past the end are zero.
//
// Shared: 2 stages x (64 rows of x, 64 rows of W) x 40 values: 20 KiB. Limit: cols a multiple of 8.
#include "cuda/async_copy.cuh"
#include "cuda/device_ops.cuh"
#include "cuda/launch.cuh"
#include "cuda/linear.h"
#include "cuda/matrix_ops.cuh"

namespace mustafar::cuda {
namespace {

constexpr int kTile = 64;
constexpr int kDepth = 32;           // columns of a slice
constexpr int kStride = kDepth + 8;  // values from one row to the next in shared memory
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kStageValues = 2 * kTile * kStride;

// One slice of 64 rows of a [n_rows][cols] matrix into shared memory.
__device__ void load_slice(const uint16_t* from, int64_t n_rows, int64_t first_row, int64_t cols,
                           int64_t first_col, uint16_t* to) {
  constexpr int kChunks = kDepth / 8;  // of 16 bytes, per row
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const int64_t source = first_row + row < n_rows ? first_row + row : n_rows - 1;
    const int64_t col = first_col + chunk * 8;
    uint16_t* target = to + row * kStride + chunk * 8;
    if (col < cols) {
      cp_async16(target, from + source * cols + col);
    } else {
      *reinterpret_cast<uint4*>(target) = uint4{0, 0, 0, 0};
    }
  }
}

template <DType kType>
__global__ void __launch_bounds__(kThreads)
    gemm_kernel(LinearPart part, const uint16_t* x, int32_t n, int64_t cols) {
  uint16_t* stages = reinterpret_cast<uint16_t*>(shared_memory());
  const int64_t first_out = int64_t{blockIdx.x} * kTile;
  const int64_t first_x = int64_t{blockIdx.y} * kTile;
  const uint16_t* weights = static_cast<const uint16_t*>(part.weights);
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int warp_x = warp / 2 * 32, warp_out = warp % 2 * 32;
  const int64_t n_slices = (cols + kDepth - 1) / kDepth;
  const auto start = [&](int64_t slice) {
    if (slice < n_slices) {
      uint16_t* stage = stages + slice % 2 * kStageValues;
      load_slice(x, n, first_x, cols, slice * kDepth, stage);
      load_slice(weights, part.rows, first_out, cols, slice * kDepth, stage + kTile * kStride);
    }
    cp_async_commit();
  };
  float acc[2][4][4] = {};
  start(0);
  for (int64_t slice = 0; slice < n_slices; slice++) {
    start(slice + 1);
    cp_async_wait<1>();
    sync_block();
    const uint16_t* x_rows = stages + slice % 2 * kStageValues;
    const uint16_t* w_rows = x_rows + kTile * kStride;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      // ldmatrix: lane i addresses row i % 8 of matrix i / 8. x: (rows, rows + 8) x (k, k + 8); W
      // likewise holds two n-tiles of 8.
      uint32_t a[2][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int row = lane % 8 + lane / 8 % 2 * 8, col = k + lane / 16 * 8;
        load_matrices<false>(a[i], x_rows + (warp_x + 16 * i + row) * kStride + col);
        const int w_row = lane % 8 + lane / 16 * 8, w_col = k + lane / 8 % 2 * 8;
        load_matrices<false>(b[i], w_rows + (warp_out + 16 * i + w_row) * kStride + w_col);
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          mma_16x8x16<kType>(acc[i][j], a[i], pair);
        }
      }
    }
    sync_block();  // before the stage is filled again
  }
  cp_async_wait<0>();
  const int g = lane / 4, c = lane % 4;
#pragma unroll
  for (int i = 0; i < 2; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
      for (int v = 0; v < 4; v++) {
        const int64_t row = first_x + warp_x + 16 * i + g + v / 2 * 8;
        const int64_t out = first_out + warp_out + 8 * j + 2 * c + v % 2;
        if (row >= n || out >= part.rows) continue;
        float* y = part.y + row * part.y_stride + out;
        const float value = acc[i][j][v] + (part.bias != nullptr ? part.bias[out] : 0.0f);
        *y = part.accumulate ? *y + value : value;
      }
    }
  }
}

// Four neighbours a thread.
__global__ void __launch_bounds__(256)
    round_kernel(DType dtype, const float* x, int64_t count, void* packed) {
  const int64_t first = (int64_t{blockIdx.x} * 256 + threadIdx.x) * 4;
  if (first + 4 <= count) {
    store_four(packed, dtype, first, *reinterpret_cast<const float4*>(x + first));
  } else {
    for (int64_t i = first; i < count; i++) store_element(packed, dtype, i, x[i]);
  }
}

__global__ void __launch_bounds__(256)
    add_bias_kernel(const float* bias, int64_t rows, float* y, int64_t y_stride) {
  const int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x;
  if (i < rows) y[blockIdx.y * y_stride + i] += bias[i];
}

}  // namespace

bool gemm_takes(const LinearArgs& args) {
  for (int i = 0; i < args.n_parts; i++) {
    const LinearPart& part = args.parts[i];
    if (part.dtype != DType::kF16 && part.dtype != DType::kBF16) return false;
    if (part.dtype != args.parts[0].dtype) return false;
    if (reinterpret_cast<uintptr_t>(part.weights) % 16 != 0) return false;
  }
  return args.cols % 8 == 0;
}

void round_to(DType dtype, const float* x, int64_t count, void* packed, Stream stream) {
  launch("round", round_kernel, {(count + 1023) / 1024}, 256, 0, stream, dtype, x, count, packed);
}

void add_bias(const float* bias, int64_t rows, int32_t n, float* y, int64_t y_stride,
              Stream stream) {
  launch("add_bias", add_bias_kernel, {(rows + 255) / 256, n}, 256, 0, stream, bias, rows, y,
         y_stride);
}

void gemm(const LinearArgs& args, Stream stream) {
  const uint16_t* x = static_cast<const uint16_t*>(args.rounded);
  for (int i = 0; i < args.n_parts; i++) {
    const LinearPart& part = args.parts[i];
    const Grid grid{(part.rows + kTile - 1) / kTile, (args.n + kTile - 1) / kTile};
    const auto kernel =
        part.dtype == DType::kF16 ? gemm_kernel<DType::kF16> : gemm_kernel<DType::kBF16>;
    launch("gemm", kernel, grid, kThreads, 2 * kStageValues * 2, stream, part, x, args.n,
           args.cols);
  }
}

}  // namespace mustafar::cuda
