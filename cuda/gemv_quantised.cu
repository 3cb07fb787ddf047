// y = W x for few rows of x and W of 8- or 4-bit codes (format/quantised_matrix.h): reads the codes
// once per 16 rows of x and multiplies them on the tensor cores.
//
// Grid: x groups of two tiles of 16 output rows over all matrices of the launch (gated: one tile of
// gate and the same of up). The 8 warps of a block take the columns in turns of 128: four pieces of
// 32. A lane (g, c), with g = lane / 4 and c = lane % 4, takes columns 8c to 8c + 7 of a piece and
// rows 4 (g % 4) to 4 (g % 4) + 3 of tile g / 4: neighbours in memory, of which two at a time are
// rows g and g + 8 of a product. The order of columns within a product is free.
//
// A is code - zero, an integer that bf16 holds; B is x, as a sum of two bf16 terms, which holds f32
// to 2^-17. The sum of a piece is in f32; it is multiplied by the group's scale and added up along
// the columns of a warp, then over the warps. Of a matrix with minimums, W x is
// scale (code x) + minimum (sum of x). The order of sums depends on the number of columns alone.
//
// A block splits x itself, 1,024 columns at a time, for all of its warps: at 4 bits that work would
// else take longer than the weights. RMSNorm before and SiLU after are part of the kernel.
//
// Shared: [piece][term][row of x][c] uint4 and, for minimums, [piece][row of x] f32, up to 8 rows
// of x twice, one of the two being filled while the other is read; after that the sums of each warp
// and the squares of x.
#include <algorithm>
#include <type_traits>

#include "cuda/device_ops.cuh"
#include "cuda/gemv_rows.cuh"
#include "cuda/launch.cuh"
#include "cuda/matrix_ops.cuh"

namespace mustafar::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTile = static_cast<int>(kTileRows);
constexpr int kRows = 2 * kTile;  // output rows of a block
constexpr int kTileX = 8;         // rows of x of a product
constexpr int kMaxTiles = 2;
constexpr int kPiece = 32;  // columns of two products
constexpr int kTurn = 4;    // pieces of a warp between two barriers
template <int kBits>
constexpr int kAhead = kBits == 4 ? 4 : 2;  // pieces whose codes are on their way
constexpr int kChunk = kWarps * kTurn;
constexpr int kTerms = 2;
static_assert(kMaxTiles * kTileX == kGemvRows);
static_assert(kPiece == kInnerStep);

template <int kTiles>
constexpr int kBuffers = kTiles == 1 ? 2 : 1;  // of x: some GPUs have 99 KiB of shared memory

// Where the parts of shared memory are, in bytes.
struct Shared {
  int terms;   // of one chunk of x
  int chunk;   // those and, for minimums, the sums of pieces
  int result;  // sums of warps
  int bytes;
};
template <int kTiles>
Shared shared_of(int n, bool minimums) {
  const int terms = kChunk * kTerms * n * 4 * 16;
  const int chunk = terms + (minimums ? kChunk * kTiles * kTileX * 4 : 0);
  const int result = kWarps * kTiles * kRows * kTileX * 4;
  const int squares = kWarps * kTiles * kTileX * 4;
  return {terms, chunk, result, std::max(kBuffers<kTiles> * chunk, result + squares)};
}

// A lane's codes of a piece: 8 of each of 4 rows.
template <int kBits>
struct Codes {
  uint4 words[kBits / 4];

  // line: the lane's first, of 64 bytes.
  __device__ __forceinline__ void load(const uint8_t* line) {
#pragma unroll
    for (int i = 0; i < kBits / 4; i++) words[i] = load_streaming(line + 64 * i);
  }
  __device__ __forceinline__ uint32_t word(int i, int row) const {
    const uint4& w = words[i];
    return row == 0 ? w.x : row == 1 ? w.y : row == 2 ? w.z : w.w;
  }

  // code - zero of a row as four words of two bf16: columns (0, 2), (1, 3), (4, 6), (5, 7).
  __device__ __forceinline__ void unpack(int row, uint32_t zero, uint32_t (&out)[4]) const {
    if constexpr (kBits == 4) {
      // A code below 128 in the low bits of the bf16 128 is 128 + code.
      constexpr uint32_t k128 = 0x43004300u, kOne = 0x3f803f80u;
      const uint32_t w = word(0, row);
      const uint32_t minus = (zero * 0x10001u | k128) ^ 0x80008000u;
      const uint32_t pairs[4] = {w, w >> 8, w >> 4, w >> 12};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        out[i] = multiply_add_bf16x2((pairs[i] & 0x000f000fu) | k128, kOne, minus);
      }
    } else {
      // A byte in the low bits of the f32 2^23 is 2^23 + byte.
      constexpr uint32_t k2To23 = 0x4b000000u;
      const float minus = -bits_float(k2To23 | zero);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t w = word(i, row);
        float code[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          code[j] = bits_float(byte_permute(w, k2To23, 0x7440u | j)) + minus;
        }
        out[2 * i] = pack2<DType::kBF16>(code[0], code[2]);
        out[2 * i + 1] = pack2<DType::kBF16>(code[1], code[3]);
      }
    }
  }
};

// Four neighbours of an array of scales or minimums. 2-byte ones are loaded ahead of their use.
struct Four {
  uint2 words;

  __device__ __forceinline__ void load(const void* array, DType dtype, int64_t at) {
    if (dtype == DType::kF32) return;
    words = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(array) + at);
  }
  __device__ __forceinline__ void values(const void* array, DType dtype, int64_t at,
                                         float (&out)[4]) const {
    if (dtype == DType::kF32) {
      load_floats(static_cast<const float*>(array) + at, out);
      return;
    }
    const uint32_t word[2] = {words.x, words.y};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint16_t bits = static_cast<uint16_t>(word[i / 2] >> (16 * (i % 2)));
      out[i] = dtype == DType::kF16 ? f16_float(bits) : bf16_float(bits);
    }
  }
};

// What a lane has on the way of a piece.
template <int kBits, Offset kOffset>
struct Ahead {
  Codes<kBits> codes;
  Four scales, minimums;
  uint32_t zeros;
};

// A lane's rows: four neighbours of one tile.
struct Place {
  const uint8_t* codes;  // of the lane's first piece
  const void* scales;
  const void* offsets;
  DType scale_dtype;
  int64_t first_scale;  // of group 0
  float group_rate;     // groups a piece

  template <int kBits>
  __device__ __forceinline__ void set(const LinearArgs& args, int g, int c) {
    const RowPlace place = row_place<kRows>(args, blockIdx.x, kTile * (g >> 2));
    const LinearPart& part = *place.part;
    const int64_t tile = place.row / kTile;
    const int64_t n_pieces = (args.cols + kPiece - 1) / kPiece;
    const int64_t n_groups = (args.cols + part.group - 1) / part.group;
    codes = static_cast<const uint8_t*>(part.weights) + tile * n_pieces * (64 * kBits) +
            c * (16 * kBits) + (g & 3) * 16;
    scales = part.scales;
    offsets = part.offsets;
    scale_dtype = part.scale_dtype;
    first_scale = tile * n_groups * kTile + 4 * (g & 3);
    group_rate = n_groups == 1 ? 0.0f : static_cast<float>(kPiece) / static_cast<float>(part.group);
  }
  // Of a piece. The quotient is at least half a piece's rate away from an integer: rounding is far
  // from that below 2^21 pieces.
  __device__ __forceinline__ int64_t scale_of(int32_t piece) const {
    const float group = (static_cast<float>(piece) + 0.5f) * group_rate;
    return first_scale + int64_t{static_cast<int32_t>(group)} * kTile;
  }
  template <int kBits, Offset kOffset>
  __device__ __forceinline__ void load(int32_t piece, Ahead<kBits, kOffset>& ahead) const {
    ahead.codes.load(codes + int64_t{piece} * (64 * kBits));
    const int64_t at = scale_of(piece);
    ahead.scales.load(scales, scale_dtype, at);
    if constexpr (kOffset == Offset::kMinimums) ahead.minimums.load(offsets, scale_dtype, at);
    if constexpr (kOffset == Offset::kZeros) {
      ahead.zeros = *reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(offsets) + at);
    }
  }
};

// Splits columns [1024 chunk, 1024 chunk + 1024) of n rows of x, times the norm's weights, into
// shared memory, and adds up the squares of x: a thread takes 4 columns of every row.
template <Offset kOffset, int kTiles>
__device__ void split_chunk(const LinearArgs& args, int32_t first_x, int32_t n, int32_t chunk,
                            uint8_t* to, int terms_bytes, float (&squares)[kTiles * kTileX]) {
  const int thread = static_cast<int>(threadIdx.x);
  const int piece = thread / 8, c = thread % 8 / 2, half = thread % 2;
  const int64_t cols = args.cols, column = int64_t{chunk} * (kChunk * kPiece) + 4 * thread;
  const bool whole = cols % 4 == 0;
  const auto load = [&](const float* row, float(&values)[4]) {
    if (whole) {
      if (column < cols) load_floats(row + column, values);
      return;
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (column + j < cols) values[j] = row[column + j];
    }
  };
  float norm[4] = {};
  if (args.norm != nullptr) load(args.norm, norm);
#pragma unroll
  for (int i = 0; i < kTiles * kTileX; i++) {
    if (i >= n) break;
    float x[4] = {};
    load(args.x + (first_x + i) * cols, x);
    if (args.norm != nullptr) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        squares[i] += x[j] * x[j];
        x[j] *= norm[j];
      }
    }
    uint32_t high[2], low[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      high[j] = pack2<DType::kBF16>(x[j], x[j + 2]);
      low[j] = pack2<DType::kBF16>(x[j] - bf16_float(static_cast<uint16_t>(high[j])),
                                   x[j + 2] - bf16_float(static_cast<uint16_t>(high[j] >> 16)));
    }
    uint2* const words =
        reinterpret_cast<uint2*>(to) + ((piece * kTerms * n + i) * 4 + c) * 2 + half;
    words[0] = {high[0], high[1]};
    words[n * 4 * 2] = {low[0], low[1]};
    if constexpr (kOffset == Offset::kMinimums) {
      float sum = x[0] + x[1] + x[2] + x[3];
#pragma unroll
      for (int m = 1; m < 8; m *= 2) sum += shuffle_xor(sum, m);
      if (thread % 8 == 0) {
        reinterpret_cast<float*>(to + terms_bytes)[piece * kTiles * kTileX + i] = sum;
      }
    }
  }
}

template <int kBits, Offset kOffset, int kTiles>
__global__ void __launch_bounds__(kThreads, kTiles == 1 ? 2 : 1)
    gemv_quantised_kernel(const __grid_constant__ LinearArgs args, int32_t first_x, int32_t n,
                          Shared shared) {
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int g = lane >> 2, c = lane & 3;
  uint8_t* const memory = shared_memory();
  const int32_t n_pieces = static_cast<int32_t>((args.cols + kPiece - 1) / kPiece);
  const int32_t n_chunks = (n_pieces + kChunk - 1) / kChunk;
  Place place;
  place.set<kBits>(args, g, c);
  int32_t piece = warp * kTurn;  // the first of the turn
  Ahead<kBits, kOffset> ahead[kAhead<kBits>];
#pragma unroll
  for (int p = 0; p < kAhead<kBits>; p++) {
    if (piece + p < n_pieces) place.load(piece + p, ahead[p]);
  }

  float sums[2][kTiles][4] = {}, squares[kTiles * kTileX] = {};
  split_chunk<kOffset, kTiles>(args, first_x, n, 0, memory, shared.terms, squares);
  for (int32_t chunk = 0; chunk < n_chunks; chunk++, piece += kChunk) {
    sync_block();
    if constexpr (kBuffers<kTiles> == 2) {
      if (chunk + 1 < n_chunks) {
        split_chunk<kOffset, kTiles>(args, first_x, n, chunk + 1,
                                     memory + (chunk + 1) % 2 * shared.chunk, shared.terms,
                                     squares);
      }
    } else if (chunk > 0) {
      split_chunk<kOffset, kTiles>(args, first_x, n, chunk, memory, shared.terms, squares);
      sync_block();
    }
    const uint8_t* const x = memory + chunk % kBuffers<kTiles> * shared.chunk;
#pragma unroll
    for (int p = 0; p < kTurn; p++) {
      if (piece + p >= n_pieces) break;
      Ahead<kBits, kOffset>& freed = ahead[p % kAhead<kBits>];
      const Ahead<kBits, kOffset> mine = freed;
      const int64_t at = place.scale_of(piece + p);
      constexpr int kLast = kTurn - kAhead<kBits>;  // whose successor is of the same turn
      const int32_t next = piece + p + (p < kLast ? kAhead<kBits> : kChunk - kLast);
      if (next < n_pieces) place.load(next, freed);
      float scale[4], minimum[4];
      mine.scales.values(place.scales, place.scale_dtype, at, scale);
      if constexpr (kOffset == Offset::kMinimums) {
        mine.minimums.values(place.offsets, place.scale_dtype, at, minimum);
      }
      const int slot = warp * kTurn + p;
      uint4 terms[kTiles][kTerms] = {};
      float2 sum_x[kTiles];
#pragma unroll
      for (int t = 0; t < kTiles; t++) {
        const int row = t * kTileX + g;
        if (row < n) {
          const uint4* const from =
              reinterpret_cast<const uint4*>(x) + (slot * kTerms * n + row) * 4 + c;
#pragma unroll
          for (int i = 0; i < kTerms; i++) terms[t][i] = from[i * n * 4];
        }
        if constexpr (kOffset == Offset::kMinimums) {
          sum_x[t] = *reinterpret_cast<const float2*>(x + shared.terms +
                                                      ((slot * kTiles + t) * kTileX + 2 * c) * 4);
        }
      }
#pragma unroll
      for (int pair = 0; pair < 2; pair++) {
        uint32_t rows[2][4];
#pragma unroll
        for (int r = 0; r < 2; r++) {
          uint32_t zero = kOffset == Offset::kMinimums ? 0u : 1u << (kBits - 1);
          if constexpr (kOffset == Offset::kZeros) zero = mine.zeros >> (8 * (2 * pair + r)) & 255u;
          mine.codes.unpack(2 * pair + r, zero, rows[r]);
        }
#pragma unroll
        for (int t = 0; t < kTiles; t++) {
          float product[4] = {};
#pragma unroll
          for (int i = 0; i < kTerms; i++) {
            mma_16x8x16<DType::kBF16>(product, {rows[0][0], rows[1][0], rows[0][1], rows[1][1]},
                                      {terms[t][i].x, terms[t][i].y});
            mma_16x8x16<DType::kBF16>(product, {rows[0][2], rows[1][2], rows[0][3], rows[1][3]},
                                      {terms[t][i].z, terms[t][i].w});
          }
#pragma unroll
          for (int i = 0; i < 4; i++) {
            float& sum = sums[pair][t][i];
            if constexpr (kOffset == Offset::kMinimums) {
              sum += minimum[2 * pair + i / 2] * (i % 2 == 0 ? sum_x[t].x : sum_x[t].y);
            }
            sum += scale[2 * pair + i / 2] * product[i];
          }
        }
      }
    }
  }

  sync_block();
  float* const all_sums = reinterpret_cast<float*>(memory);
  float* const all_squares = reinterpret_cast<float*>(memory + shared.result);
#pragma unroll
  for (int t = 0; t < kTiles; t++) {
    float* const mine = all_sums + (warp * kTiles + t) * kRows * kTileX;
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = kTile * (g >> 2) + 4 * (g & 3) + 2 * pair + i / 2;
        mine[row * kTileX + 2 * c + i % 2] = sums[pair][t][i];
      }
    }
  }
  if (args.norm != nullptr) {
#pragma unroll
    for (int i = 0; i < kTiles * kTileX; i++) {
      if (i >= n) break;
      const float sum = warp_sum(squares[i]);
      if (lane == 0) all_squares[warp * kTiles * kTileX + i] = sum;
    }
  }
  sync_block();
  for (int i = static_cast<int>(threadIdx.x); i < kTiles * kRows * kTileX; i += kThreads) {
    const int row = i % kRows, x = i / kRows;
    if (x >= n) continue;
    const auto over_warps = [&](const float* from, int stride) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; w++) sum += from[w * stride];
      return sum;
    };
    const float scale = args.norm != nullptr
                            ? norm_scale(args, over_warps(all_squares + x, kTiles * kTileX))
                            : 1.0f;
    store_row<kRows>(args, blockIdx.x, row, first_x + x, scale, [&](int r) {
      return over_warps(all_sums + (x / kTileX * kRows + r) * kTileX + x % kTileX,
                        kTiles * kRows * kTileX);
    });
  }
}

template <int kBits, Offset kOffset>
void run(const LinearArgs& args, Stream stream) {
  const Grid grid{row_groups<kRows>(args)};
  for (int32_t first = 0; first < args.n; first += kGemvRows) {
    const int32_t n = args.n - first < kGemvRows ? args.n - first : kGemvRows;
    const auto start = [&](auto tiles) {
      constexpr int kTiles = decltype(tiles)::value;
      const Shared shared = shared_of<kTiles>(n, kOffset == Offset::kMinimums);
      launch("gemv_quantised", gemv_quantised_kernel<kBits, kOffset, kTiles>, grid, kThreads,
             shared.bytes, stream, args, first, n, shared);
    };
    if (n <= kTileX) {
      start(std::integral_constant<int, 1>());
    } else {
      start(std::integral_constant<int, 2>());
    }
  }
}

template <int kBits>
void run(const LinearArgs& args, Stream stream) {
  switch (args.parts[0].offset) {
    case Offset::kZeros:
      return run<kBits, Offset::kZeros>(args, stream);
    case Offset::kMinimums:
      return run<kBits, Offset::kMinimums>(args, stream);
    default:
      return run<kBits, Offset::kNone>(args, stream);
  }
}

}  // namespace

void gemv_quantised(const LinearArgs& args, Stream stream) {
  if (args.parts[0].dtype == DType::kInt4) {
    run<4>(args, stream);
  } else {
    run<8>(args, stream);
  }
}

}  // namespace mustafar::cuda
