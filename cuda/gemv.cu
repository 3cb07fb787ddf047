// y = W x for few rows of x: reads W once per 8 of them, at 16 bytes a load.
//
// Grid: x groups of output rows over all matrices of the launch; 4 warps, each takes 4 output rows,
// its lanes stride over the columns; sums in f32, lanes first, then across the warp. The order of a
// sum depends on nothing but the number of columns.
#include "cuda/device_ops.cuh"
#include "cuda/launch.cuh"
#include "cuda/linear.h"

namespace mustafar::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kRows = 4;  // output rows of a warp

// kValues weights at index i of a row.
template <DType kType, int kValues>
__device__ __forceinline__ void load_weights(const void* row, int64_t i, float (&w)[kValues]) {
  if constexpr (kValues == 1) {
    w[0] = load_element(row, kType, i);
  } else if constexpr (kType == DType::kF32) {
    const float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(row) + i);
    w[0] = four.x;
    w[1] = four.y;
    w[2] = four.z;
    w[3] = four.w;
  } else {
    const uint4 words = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(row) + i);
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      w[2 * j] = half_float<kType>(static_cast<uint16_t>(word[j]));
      w[2 * j + 1] = half_float<kType>(static_cast<uint16_t>(word[j] >> 16));
    }
  }
}

template <DType kType, int kBatch, bool kVector>
__device__ void run_rows(const LinearArgs& args, const LinearPart& part, int64_t first_row,
                         int32_t first_x, int32_t n) {
  constexpr int kValues = !kVector ? 1 : kType == DType::kF32 ? 4 : 8;
  const int lane = lane_id();
  const int64_t cols = args.cols;
  const int64_t row_bytes = cols * (kType == DType::kF32 ? 4 : 2);
  const uint8_t* rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const int64_t row = first_row + r < part.rows ? first_row + r : part.rows - 1;
    rows[r] = static_cast<const uint8_t*>(part.weights) + row * row_bytes;
  }
  float sums[kRows][kBatch] = {};
  for (int64_t i = int64_t{lane} * kValues; i < cols; i += kWarpSize * kValues) {
    float w[kRows][kValues];
#pragma unroll
    for (int r = 0; r < kRows; r++) load_weights<kType, kValues>(rows[r], i, w[r]);
#pragma unroll
    for (int b = 0; b < kBatch; b++) {
      if (b >= n) continue;
      const float* x = args.x + (first_x + b) * cols + i;
#pragma unroll
      for (int j = 0; j < kValues; j++) {
        const float value = x[j];
#pragma unroll
        for (int r = 0; r < kRows; r++) sums[r][b] += w[r][j] * value;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; r++) {
#pragma unroll
    for (int b = 0; b < kBatch; b++) {
      if (b >= n) continue;
      const float sum = warp_sum(sums[r][b]);
      const int64_t row = first_row + r;
      if (lane != 0 || row >= part.rows) continue;
      float* y = part.y + (first_x + b) * part.y_stride + row;
      const float value = sum + (part.bias != nullptr ? part.bias[row] : 0.0f);
      *y = part.accumulate ? *y + value : value;
    }
  }
}

template <int kBatch>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    gemv_kernel(LinearArgs args, int32_t first_x, int32_t n, bool vector) {
  int64_t group = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  LinearPart part;
  bool found = false;
#pragma unroll
  for (int i = 0; i < kMaxFused; i++) {
    const int64_t groups = (args.parts[i].rows + kRows - 1) / kRows;
    if (found || i >= args.n_parts) continue;
    if (group < groups) {
      part = args.parts[i];
      found = true;
    } else {
      group -= groups;
    }
  }
  if (!found) return;
  const int64_t row = group * kRows;
  const auto run = [&](auto wide) {
    constexpr bool kVector = decltype(wide)::value;
    switch (part.dtype) {
      case DType::kF32:
        run_rows<DType::kF32, kBatch, kVector>(args, part, row, first_x, n);
        break;
      case DType::kF16:
        run_rows<DType::kF16, kBatch, kVector>(args, part, row, first_x, n);
        break;
      default:
        run_rows<DType::kBF16, kBatch, kVector>(args, part, row, first_x, n);
        break;
    }
  };
  if (vector) {
    run(std::true_type());
  } else {
    run(std::false_type());
  }
}

}  // namespace

void gemv(const LinearArgs& args, Stream stream) {
  int64_t groups = 0;
  bool vector = true;
  for (int i = 0; i < args.n_parts; i++) {
    const LinearPart& part = args.parts[i];
    groups += (part.rows + kRows - 1) / kRows;
    vector = vector && args.cols * (part.dtype == DType::kF32 ? 4 : 2) % 16 == 0 &&
             reinterpret_cast<uintptr_t>(part.weights) % 16 == 0;
  }
  const Grid grid{(groups + kWarps - 1) / kWarps};
  for (int32_t first = 0; first < args.n; first += kGemvRows) {
    const int32_t n = args.n - first < kGemvRows ? args.n - first : kGemvRows;
    const auto kernel = n == 1 ? gemv_kernel<1> : n <= 4 ? gemv_kernel<4> : gemv_kernel<8>;
    launch("gemv", kernel, grid, kWarps * kWarpSize, 0, stream, args, first, n, vector);
  }
}

}  // namespace mustafar::cuda
