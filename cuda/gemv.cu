// y = W x for few rows of x: reads W once per 8 of them, at 16 bytes a load. For f32, and for what
// gemv_tensor.cu does not take.
//
// Grid: x groups of kRows output rows over all matrices of the launch. The 4 warps of a block share
// the rows and take the columns in turn, so that even a matrix of 4,096 rows has enough loads in
// flight; a lane has the next columns' weights on their way while it works on these. Sums in f32:
// lanes first, then across the warp, then across the warps through shared memory. The order of a
// sum depends on nothing but the number of columns.
//
// The operations before and after are part of the kernel. RMSNorm before: W (x s n) = s (W (x n)),
// so every warp adds up the squares of the columns that it reads anyway, and the scale s is applied
// at the end. SiLU after: a group is the same rows of gate and up.
//
// Shared: sums and squares of each warp, kWarps x kBatch x (kRows + 1) f32.
#include "cuda/device_ops.cuh"
#include "cuda/gemv_rows.cuh"
#include "cuda/launch.cuh"
#include "cuda/linear.h"

namespace mustafar::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kRows = 4;                // output rows of a block
constexpr int kBatchX = 8;              // rows of x that a pass takes
constexpr int64_t kLargeGroups = 4096;  // blocks of rows of what gemv() takes for a large matrix

template <DType kType, bool kVector>
constexpr int kValues = !kVector               ? 1
                        : kType == DType::kF32 ? 4
                                               : 8;

// A lane's share of a row as it lies in memory.
template <DType kType, bool kVector>
struct Weights {
  uint4 words;

  __device__ __forceinline__ void load(const uint8_t* row, int64_t i) {
    if constexpr (kVector) {
      words = load_streaming(row + i * (kType == DType::kF32 ? 4 : 2));
    } else {
      words.x = float_bits(load_element(row, kType, i));
    }
  }
  __device__ __forceinline__ void unpack(float (&w)[kValues<kType, kVector>]) const {
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
    if constexpr (!kVector || kType == DType::kF32) {
#pragma unroll
      for (int j = 0; j < kValues<kType, kVector>; j++) w[j] = bits_float(word[j]);
    } else {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        w[2 * j] = half_float<kType>(static_cast<uint16_t>(word[j]));
        w[2 * j + 1] = half_float<kType>(static_cast<uint16_t>(word[j] >> 16));
      }
    }
  }
};

// The sums of this warp's columns, and of the squares of x, each over the whole warp.
template <DType kType, int kBatch, bool kVector>
__device__ void sum_columns(const LinearArgs& args, int32_t first_x, int32_t n,
                            float (&sums)[kBatch][kRows], float (&squares)[kBatch]) {
  constexpr int kCount = kValues<kType, kVector>;
  constexpr int kStep = kWarps * kWarpSize * kCount;
  const int64_t cols = args.cols;
  const int64_t row_bytes = cols * (kType == DType::kF32 ? 4 : 2);
  const uint8_t* rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const RowPlace place = row_place<kRows>(args, blockIdx.x, r);
    rows[r] = static_cast<const uint8_t*>(place.part->weights) + place.row * row_bytes;
  }
  Weights<kType, kVector> next[kRows];
  int64_t i = int64_t{threadIdx.x} * kCount;
  if (i < cols) {
#pragma unroll
    for (int r = 0; r < kRows; r++) next[r].load(rows[r], i);
  }
  for (; i < cols; i += kStep) {
    float w[kRows][kCount];
#pragma unroll
    for (int r = 0; r < kRows; r++) next[r].unpack(w[r]);
    if (i + kStep < cols) {
#pragma unroll
      for (int r = 0; r < kRows; r++) next[r].load(rows[r], i + kStep);
    }
    float norm[kCount];
    if (args.norm != nullptr) load_floats(args.norm + i, norm);
#pragma unroll
    for (int b = 0; b < kBatch; b++) {
      if (b >= n) continue;
      float x[kCount];
      load_floats(args.x + (first_x + b) * cols + i, x);
      if (args.norm != nullptr) {
#pragma unroll
        for (int j = 0; j < kCount; j++) {
          squares[b] += x[j] * x[j];
          x[j] *= norm[j];
        }
      }
#pragma unroll
      for (int j = 0; j < kCount; j++) {
#pragma unroll
        for (int r = 0; r < kRows; r++) sums[b][r] += w[r][j] * x[j];
      }
    }
  }
#pragma unroll
  for (int b = 0; b < kBatch; b++) {
    if (b >= n) continue;
#pragma unroll
    for (int r = 0; r < kRows; r++) sums[b][r] = warp_sum(sums[b][r]);
    if (args.norm != nullptr) squares[b] = warp_sum(squares[b]);
  }
}

template <DType kType, int kBatch, bool kVector>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    gemv_kernel(const __grid_constant__ LinearArgs args, int32_t first_x, int32_t n) {
  float sums[kBatch][kRows] = {}, squares[kBatch] = {};
  sum_columns<kType, kBatch, kVector>(args, first_x, n, sums, squares);
  float* const shared = reinterpret_cast<float*>(shared_memory());
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  if (lane_id() == 0) {
#pragma unroll
    for (int b = 0; b < kBatch; b++) {
      float* const mine = shared + (warp * kBatch + b) * (kRows + 1);
#pragma unroll
      for (int r = 0; r < kRows; r++) mine[r] = sums[b][r];
      mine[kRows] = squares[b];
    }
  }
  sync_block();
  const int b = static_cast<int>(threadIdx.x) / kRows, r = static_cast<int>(threadIdx.x) % kRows;
  if (b >= n) return;
  const auto total = [&](int column) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; w++) sum += shared[(w * kBatch + b) * (kRows + 1) + column];
    return sum;
  };
  store_row<kRows>(args, blockIdx.x, r, first_x + b,
                   args.norm != nullptr ? norm_scale(args, total(kRows)) : 1.0f, total);
}

template <DType kType, bool kVector>
void run(const LinearArgs& args, Stream stream) {
  const int64_t groups = row_groups<kRows>(args);
  for (int32_t first = 0; first < args.n; first += kBatchX) {
    const int32_t n = args.n - first < kBatchX ? args.n - first : kBatchX;
    const auto start = [&](auto kernel, int batch) {
      launch("gemv", kernel, {groups}, kWarps * kWarpSize, kWarps * batch * (kRows + 1) * 4, stream,
             args, first, n);
    };
    if (n == 1) {
      start(gemv_kernel<kType, 1, kVector>, 1);
    } else if (n == 2) {
      start(gemv_kernel<kType, 2, kVector>, 2);
    } else if (n <= 4) {
      start(gemv_kernel<kType, 4, kVector>, 4);
    } else {
      start(gemv_kernel<kType, 8, kVector>, 8);
    }
  }
}

}  // namespace

void gemv(const LinearArgs& args, Stream stream) {
  static_assert(kBatchX * kRows <= kWarps * kWarpSize);
  const DType dtype = args.parts[0].dtype;
  for (int i = 1; i < args.n_parts; i++) {
    if (!args.parts[i].like(args.parts[0])) {
      throw Error("gemv: the matrices of one launch are not alike");
    }
  }
  if (args.parts[0].quantised()) {
    gemv_quantised(args, stream);
    return;
  }
  bool vector = reinterpret_cast<uintptr_t>(args.x) % 16 == 0 &&
                reinterpret_cast<uintptr_t>(args.norm) % 16 == 0;
  for (int i = 0; i < args.n_parts; i++) {
    const LinearPart& part = args.parts[i];
    vector = vector && args.cols * (dtype == DType::kF32 ? 4 : 2) % 16 == 0 &&
             reinterpret_cast<uintptr_t>(part.weights) % 16 == 0;
  }
  // One row of x needs no tensor cores, and this kernel's loads, of whole cache lines, read a large
  // matrix faster than those of gemv_tensor.cu.
  const bool large = args.n == 1 && row_groups<kRows>(args) >= kLargeGroups;
  if (vector && dtype != DType::kF32 && !large) {
    gemv_tensor(args, stream);
    return;
  }
  const auto typed = [&](auto wide) {
    constexpr bool kVector = decltype(wide)::value;
    switch (dtype) {
      case DType::kF32:
        return run<DType::kF32, kVector>(args, stream);
      case DType::kF16:
        return run<DType::kF16, kVector>(args, stream);
      default:
        return run<DType::kBF16, kVector>(args, stream);
    }
  };
  if (vector) {
    typed(std::true_type());
  } else {
    typed(std::false_type());
  }
}

}  // namespace mustafar::cuda
