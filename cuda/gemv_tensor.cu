// y = W x for few rows of x and 2-byte W: reads W once per 16 rows of x, and multiplies on the
// tensor cores, where a batch costs no more than one row.
//
// Grid: x groups of 16 output rows over all matrices of the launch. The 8 warps of a block take the
// columns in turns of 64. W is the A operand straight from global memory: the order of columns
// within a product is free, so lane (g, c) of a warp (g = lane / 4, c = lane % 4) takes 8
// neighbouring columns of rows g and g + 8 at one 16-byte load each, for two products of 16x8x16.
// The next turn's loads are under way meanwhile, and the first turn's before the kernel before has
// ended. B is x, as a sum of two terms of W's type, which holds f32 to 2^-17 (bf16) or 2^-22 (f16,
// where x is taken 16 times smaller: up to 10^6). Sums in f32: along the columns of a warp, then
// over the warps. Their order depends on the number of columns alone, not on the batch.
//
// RMSNorm before and SiLU after are part of the kernel, as in gemv.cu.
//
// Shared: per warp the sums [tile][row][column of x] and the squares of x, f32.
#include "cuda/device_ops.cuh"
#include "cuda/gemv_rows.cuh"
#include "cuda/launch.cuh"
#include "cuda/matrix_ops.cuh"

namespace mustafar::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kRows = 16;   // output rows of a block
constexpr int kTileX = 8;   // rows of x of a tile
constexpr int kPieces = 2;  // of 32 columns, a warp's turn
constexpr int kTurn = kWarps * kPieces * 32;
constexpr int kMaxTiles = 2;
static_assert(kMaxTiles * kTileX == kGemvRows);

constexpr int shared_floats(int tiles) { return kWarps * tiles * (kRows * kTileX + kTileX); }

// What x is divided by before it is split into two terms: f16 reaches to 65,504 only.
template <DType kType>
constexpr float kUnit = kType == DType::kF16 ? 16.0f : 1.0f;

// A lane's weights of a turn: rows g and g + 8.
struct Turn {
  uint4 words[kPieces][2];

  __device__ __forceinline__ void load(const uint8_t* const (&rows)[2], int64_t column,
                                       int64_t cols) {
#pragma unroll
    for (int p = 0; p < kPieces; p++) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        words[p][r] = column + 32 * p < cols ? load_streaming(rows[r] + 2 * (column + 32 * p))
                                             : uint4{0, 0, 0, 0};
      }
    }
  }
};

template <DType kType, int kTiles>
__global__ void __launch_bounds__(kThreads, kTiles == 1 ? 3 : 2)
    gemv_tensor_kernel(const __grid_constant__ LinearArgs args, int32_t first_x, int32_t n) {
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int g = lane >> 2, c = lane & 3;
  const int64_t cols = args.cols;
  const uint8_t* rows[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const RowPlace place = row_place<kRows>(args, blockIdx.x, g + 8 * r);
    rows[r] = static_cast<const uint8_t*>(place.part->weights) + place.row * cols * 2;
  }
  int64_t column = warp * kPieces * 32 + 8 * c;
  Turn next;
  next.load(rows, column, cols);

  float sums[kTiles][4] = {}, squares[kTiles] = {};
  for (; column - 8 * c < cols; column += kTurn) {
    const Turn turn = next;
    next.load(rows, column + kTurn, cols);
#pragma unroll
    for (int p = 0; p < kPieces; p++) {
      const int64_t at = column + 32 * p;
      const bool inside = at < cols;
      float norm[8];
      if (args.norm != nullptr && inside) load_floats(args.norm + at, norm);
#pragma unroll
      for (int t = 0; t < kTiles; t++) {
        uint32_t high[4] = {}, low[4] = {};
        if (inside && t * kTileX + g < n) {
          float x[8];
          load_floats(args.x + (first_x + t * kTileX + g) * cols + at, x);
          if (args.norm != nullptr) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
              squares[t] += x[j] * x[j];
              x[j] *= norm[j];
            }
          }
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const float a = x[2 * j] / kUnit<kType>, b = x[2 * j + 1] / kUnit<kType>;
            high[j] = pack2<kType>(a, b);
            low[j] = pack2<kType>(a - half_float<kType>(static_cast<uint16_t>(high[j])),
                                  b - half_float<kType>(static_cast<uint16_t>(high[j] >> 16)));
          }
        }
        const uint4& w0 = turn.words[p][0];
        const uint4& w1 = turn.words[p][1];
        const uint32_t a[2][4] = {{w0.x, w1.x, w0.y, w1.y}, {w0.z, w1.z, w0.w, w1.w}};
#pragma unroll
        for (int s = 0; s < 2; s++) {
          mma_16x8x16<kType>(sums[t], a[s], {high[2 * s], high[2 * s + 1]});
          mma_16x8x16<kType>(sums[t], a[s], {low[2 * s], low[2 * s + 1]});
        }
      }
    }
  }

  float* const all_sums = reinterpret_cast<float*>(shared_memory());
  float* const all_squares = all_sums + kWarps * kTiles * kRows * kTileX;
#pragma unroll
  for (int t = 0; t < kTiles; t++) {
    float* const mine = all_sums + (warp * kTiles + t) * kRows * kTileX;
#pragma unroll
    for (int i = 0; i < 4; i++) mine[(g + i / 2 * 8) * kTileX + 2 * c + i % 2] = sums[t][i];
    squares[t] += shuffle_xor(squares[t], 1);
    squares[t] += shuffle_xor(squares[t], 2);
    if (c == 0) all_squares[(warp * kTiles + t) * kTileX + g] = squares[t];
  }
  sync_block();
  for (int i = static_cast<int>(threadIdx.x); i < kTiles * kRows * kTileX; i += kThreads) {
    const int row = i % kRows, x = i / kRows % kTileX, tile = i / (kRows * kTileX);
    if (tile * kTileX + x >= n) continue;
    const float scale =
        args.norm != nullptr
            ? norm_scale(args, sum_apart<kWarps>(all_squares + tile * kTileX + x, kTiles * kTileX))
            : 1.0f;
    store_row<kRows>(args, blockIdx.x, row, first_x + tile * kTileX + x, scale * kUnit<kType>,
                     [&](int r) {
                       return sum_apart<kWarps>(all_sums + (tile * kRows + r) * kTileX + x,
                                                kTiles * kRows * kTileX);
                     });
  }
}

template <DType kType>
void run(const LinearArgs& args, Stream stream) {
  const Grid grid{row_groups<kRows>(args)};
  for (int32_t first = 0; first < args.n; first += kGemvRows) {
    const int32_t n = args.n - first < kGemvRows ? args.n - first : kGemvRows;
    const int tiles = n <= kTileX ? 1 : 2;
    launch("gemv_tensor", tiles == 1 ? gemv_tensor_kernel<kType, 1> : gemv_tensor_kernel<kType, 2>,
           grid, kThreads, shared_floats(tiles) * 4, stream, args, first, n);
  }
}

}  // namespace

void gemv_tensor(const LinearArgs& args, Stream stream) {
  if (args.parts[0].dtype == DType::kF16) {
    run<DType::kF16>(args, stream);
  } else {
    run<DType::kBF16>(args, stream);
  }
}

}  // namespace mustafar::cuda
