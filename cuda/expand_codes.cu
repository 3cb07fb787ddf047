// Values of a matrix of codes (format/quantised_matrix.h): a block of it for products of many rows,
// and rows of an embedding.
//
// Grid of expand_codes: x tiles of 16 rows, y pieces of 256 columns. A lane takes 8 neighbouring
// columns, a warp two rows one after the other: results are written in whole lines, codes are read
// in parts of 64-byte lines that the block's warps share in the L1.
#include "cuda/code_values.cuh"
#include "cuda/device_ops.cuh"
#include "cuda/launch.cuh"
#include "cuda/linear.h"

namespace mustafar::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kBlockColumns = kWarpSize * kCodeColumns;
constexpr int kTile = static_cast<int>(kTileRows);

__global__ void __launch_bounds__(kThreads)
    expand_codes_kernel(const __grid_constant__ LinearPart part, int64_t cols, int64_t first,
                        int64_t rows, DType dtype, void* out) {
  const int64_t column = int64_t{blockIdx.y} * kBlockColumns + lane_id() * kCodeColumns;
  if (column >= cols) return;
  const int64_t warp = threadIdx.x / kWarpSize;
  for (int64_t row = int64_t{blockIdx.x} * kTile + warp; row < rows; row += kWarps) {
    if (row >= (int64_t{blockIdx.x} + 1) * kTile) break;
    float values[kCodeColumns];
    load_values(part, cols, first + row, column, values);
    if (cols % kCodeColumns == 0 && dtype != DType::kF32) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        words[j] = dtype == DType::kF16 ? pack2<DType::kF16>(values[2 * j], values[2 * j + 1])
                                        : pack2<DType::kBF16>(values[2 * j], values[2 * j + 1]);
      }
      *reinterpret_cast<uint4*>(static_cast<uint16_t*>(out) + row * cols + column) = {
          words[0], words[1], words[2], words[3]};
      continue;
    }
#pragma unroll
    for (int j = 0; j < kCodeColumns; j++) {
      if (column + j < cols) store_element(out, dtype, row * cols + column + j, values[j]);
    }
  }
}

// Grid: x rows, y pieces of columns.
__global__ void __launch_bounds__(kThreads)
    embed_codes_kernel(const __grid_constant__ LinearPart table, const int32_t* token_ids,
                       int64_t hidden, float* out) {
  const int64_t row = blockIdx.x;
  const int64_t column = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * kCodeColumns;
  if (column >= hidden) return;
  float values[kCodeColumns];
  load_values(table, hidden, token_ids[row], column, values);
#pragma unroll
  for (int j = 0; j < kCodeColumns; j++) {
    if (column + j < hidden) out[row * hidden + column + j] = values[j];
  }
}

}  // namespace

void expand_codes(const LinearPart& part, int64_t cols, int64_t first, int64_t rows, DType dtype,
                  void* out, Stream stream) {
  launch("expand_codes", expand_codes_kernel,
         {(rows + kTile - 1) / kTile, (cols + kBlockColumns - 1) / kBlockColumns}, kThreads, 0,
         stream, part, cols, first, rows, dtype, out);
}

void embed_codes(const LinearPart& table, const int32_t* token_ids, int32_t n, int64_t hidden,
                 float* out, Stream stream) {
  constexpr int64_t kColumnsOfBlock = int64_t{kThreads} * kCodeColumns;
  launch("embed_codes", embed_codes_kernel, {n, (hidden + kColumnsOfBlock - 1) / kColumnsOfBlock},
         kThreads, 0, stream, table, token_ids, hidden, out);
}

}  // namespace mustafar::cuda
