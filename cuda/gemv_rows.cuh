// What both GEMV kernels share: which row of which matrix is row r of a block, how it is stored,
// and the loads of x.
#pragma once

#include "cuda/device_ops.cuh"
#include "cuda/linear.h"

namespace mustafar::cuda {

// Where a row of the launch is. Behind a matrix's last row a group is filled up with rows that do
// not exist: they compute with the last one, and are not stored.
struct RowPlace {
  const LinearPart* part;
  int64_t row;
  bool exists;
};

// Row r of a group: kRows neighbours of one matrix or, where they are gated, kRows / 2 of gate and
// then the same of up.
template <int kRows>
__device__ __forceinline__ RowPlace row_place(const LinearArgs& args, int64_t group, int r) {
  if (args.gated) {
    const LinearPart& part = args.parts[r / (kRows / 2)];
    const int64_t row = group * (kRows / 2) + r % (kRows / 2);
    return {&part, row < part.rows ? row : part.rows - 1, row < part.rows};
  }
  int i = 0;
  for (; i + 1 < args.n_parts; i++) {
    const int64_t groups = (args.parts[i].rows + kRows - 1) / kRows;
    if (group < groups) break;
    group -= groups;
  }
  const LinearPart& part = args.parts[i];
  const int64_t row = group * kRows + r;
  return {&part, row < part.rows ? row : part.rows - 1, row < part.rows};
}

// Blocks of kRows rows each.
template <int kRows>
int64_t row_groups(const LinearArgs& args) {
  if (args.gated) return (args.parts[0].rows + kRows / 2 - 1) / (kRows / 2);
  int64_t groups = 0;
  for (int i = 0; i < args.n_parts; i++) groups += (args.parts[i].rows + kRows - 1) / kRows;
  return groups;
}

// Stores what row r of a group comes to: sum(r) is its product with one row of x, unscaled and
// without bias.
template <int kRows, typename Sum>
__device__ __forceinline__ void store_row(const LinearArgs& args, int64_t group, int r,
                                          int64_t x_row, float scale, Sum&& sum) {
  const RowPlace place = row_place<kRows>(args, group, r);
  if (!place.exists || (args.gated && r >= kRows / 2)) return;
  const auto value = [&](const RowPlace& at, int row) {
    return sum(row) * scale + (at.part->bias != nullptr ? at.part->bias[at.row] : 0.0f);
  };
  float result = value(place, r);
  if (args.gated) {
    const int up = r + kRows / 2;
    result = result / (1.0f + expf(-result)) * value(row_place<kRows>(args, group, up), up);
  }
  float* const y = place.part->y + x_row * place.part->y_stride + place.row;
  *y = place.part->accumulate ? *y + result : result;
}

// kCount neighbours: one, or fours from a 16-byte boundary on.
template <int kCount>
__device__ __forceinline__ void load_floats(const float* from, float (&values)[kCount]) {
  if constexpr (kCount == 1) {
    values[0] = from[0];
  } else {
#pragma unroll
    for (int j = 0; j < kCount / 4; j++) {
      const float4 four = reinterpret_cast<const float4*>(from)[j];
      values[4 * j] = four.x;
      values[4 * j + 1] = four.y;
      values[4 * j + 2] = four.z;
      values[4 * j + 3] = four.w;
    }
  }
}

// The sum of kCount numbers that lie `stride` apart.
template <int kCount>
__device__ __forceinline__ float sum_apart(const float* from, int stride) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; i++) sum += from[i * stride];
  return sum;
}

// What RMSNorm multiplies a row by, from the row's sum of squares.
__device__ __forceinline__ float norm_scale(const LinearArgs& args, float squares) {
  return 1.0f / sqrtf(squares / static_cast<float>(args.cols) + args.eps);
}

// y = W x on the tensor cores: f16 or bf16 matrices of rows of whole 16 bytes (gemv_tensor.cu), or
// matrices of one type of codes and offsets (gemv_quantised.cu).
void gemv_tensor(const LinearArgs& args, Stream stream);
void gemv_quantised(const LinearArgs& args, Stream stream);

}  // namespace mustafar::cuda
