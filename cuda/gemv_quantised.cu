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
// to 2^-17: the terms of four rows are the columns of a product. The sum of a
// piece is in f32; it is multiplied by the group's scale and added up along
// the columns of a warp, then over the warps. Of a matrix with minimums, W x is
// scale (code x) + minimum (sum of x). The order of sums depends on the number of columns alone.
//
// A block splits x itself, 1,024 columns at a time, for all of its warps: at 4 bits that work would
// else take longer than the weights. RMSNorm before and SiLU after are part of the kernel.
//
// Columns in fours, in rows of whole 16 bytes, are taken by that kernel; any by a plain one, a warp
// for two rows and one row of x.
//
// Shared: [piece][term][row of x][c] uint4 and, for minimums, [piece][row of x] f32, up to 8 rows
// of x twice, one of the two being filled while the other is read; after that the sums of each warp
// and the squares of x.
#include <algorithm>
#include <type_traits>

#include "cuda/code_values.cuh"
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
constexpr int kColumns = 8;       // of a product: two terms of each of kTileX rows of x
constexpr int kTileX = 4;
constexpr int kPiece = 32;  // columns of two products
constexpr int kTurn = 4;    // pieces of a warp between two barriers
template <int kBits>
constexpr int kAhead = kBits == 4 ? 4 : 2;  // pieces whose codes are on their way
constexpr int kChunk = kWarps * kTurn;
constexpr int kTerms = 2;
static_assert(kGemvRows % kTileX == 0);
static_assert(kPiece == kInnerStep);

// kMost: how many rows of x a pass takes at most, 4, 8 or 16.
template <int kMost>
constexpr int kTiles = kMost / kTileX;
template <int kMost>
constexpr int kBuffers = kMost <= 8 ? 2 : 1;  // of x: some GPUs have 99 KiB of shared memory

// Where the parts of shared memory are, in bytes.
struct Shared {
  int terms;   // of one chunk of x
  int chunk;   // those and, for minimums, the sums of pieces
  int result;  // sums of warps
  int bytes;
};
template <int kMost>
Shared shared_of(int n, bool minimums) {
  const int terms = kChunk * kTerms * n * 4 * 16;
  const int chunk = terms + (minimums ? kChunk * kMost * 4 : 0);
  const int result = kWarps * kTiles<kMost> * kRows * kColumns * 4;
  const int squares = kWarps * kMost * 4;
  return {terms, chunk, result, std::max(kBuffers<kMost> * chunk, result + squares)};
}

// What a lane has on the way of a piece: 8 codes of each of 4 rows, and the scales and offsets of
// those. kWide: scales are f32.
template <int kBits, Offset kOffset, bool kWide>
struct Ahead {
  uint4 codes[kBits / 4];
  std::conditional_t<kWide, uint4, uint2> scales;
  uint2 minimums;
  uint32_t zeros;
};

// code - zero of 8 codes as four words of two bf16: columns (0, 2), (1, 3), (4, 6), (5, 7).
__device__ __forceinline__ void unpack(uint32_t word, uint32_t zero, uint32_t (&out)[4]) {
  // A code below 128 in the low bits of the bf16 128 is 128 + code.
  constexpr uint32_t k128 = 0x43004300u, kOne = 0x3f803f80u;
  const uint32_t minus = (zero * 0x10001u | k128) ^ 0x80008000u;
  const uint32_t pairs[4] = {word, word >> 8, word >> 4, word >> 12};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    out[i] = multiply_add_bf16x2(and_or(pairs[i], 0x000f000fu, k128), kOne, minus);
  }
}
__device__ __forceinline__ void unpack(uint32_t low, uint32_t high, uint32_t zero,
                                       uint32_t (&out)[4]) {
  // A byte in the low bits of the f32 2^23 is 2^23 + byte.
  constexpr uint32_t k2To23 = 0x4b000000u;
  const float minus = -bits_float(k2To23 | zero);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float code[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      code[j] = bits_float(byte_permute(i == 0 ? low : high, k2To23, 0x7440u | j)) + minus;
    }
    out[2 * i] = pack2<DType::kBF16>(code[0], code[2]);
    out[2 * i + 1] = pack2<DType::kBF16>(code[1], code[3]);
  }
}

__device__ __forceinline__ uint32_t word_of(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

__device__ __forceinline__ void floats_of(const uint2& words, bool f16, float (&out)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint16_t bits = static_cast<uint16_t>((i < 2 ? words.x : words.y) >> (16 * (i % 2)));
    out[i] = f16 ? f16_float(bits) : bf16_float(bits);
  }
}
__device__ __forceinline__ void floats_of(const uint4& words, bool, float (&out)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) out[i] = bits_float(word_of(words, i));
}

// A lane's rows: four neighbours of one tile.
template <int kBits, Offset kOffset, bool kWide>
struct Place {
  static constexpr int kScaleBytes = kWide ? 4 : 2;

  const uint8_t* codes;    // of the lane's first piece
  const uint8_t* scales;   // of group 0
  const uint8_t* offsets;  // the same
  uint32_t group_rate;     // groups a piece, times 2^31
  bool f16;                // scales and minimums are, else bf16

  __device__ __forceinline__ Place(const LinearArgs& args, int g, int c) {
    const RowPlace place = row_place<kRows>(args, blockIdx.x, kTile * (g >> 2));
    const LinearPart& part = *place.part;
    const int64_t tile = place.row / kTile;
    const uint32_t cols = static_cast<uint32_t>(args.cols), group = part.group;
    const int64_t n_pieces = (cols + kPiece - 1) / kPiece, n_groups = (cols + group - 1) / group;
    const int64_t first = tile * n_groups * kTile + 4 * (g & 3);
    codes = static_cast<const uint8_t*>(part.weights) + tile * n_pieces * (64 * kBits) +
            c * (16 * kBits) + (g & 3) * 16;
    scales = static_cast<const uint8_t*>(part.scales) + first * kScaleBytes;
    offsets = static_cast<const uint8_t*>(part.offsets) +
              first * (kOffset == Offset::kMinimums ? kScaleBytes : 1);
    // Rounded up: exact while pieces times pieces a group are below 2^31.
    const uint32_t pieces = group / kPiece;
    group_rate = n_groups == 1 ? 0u : (0x80000000u - 1) / pieces + 1;
    f16 = part.scale_dtype == DType::kF16;
  }
  __device__ __forceinline__ void load(int32_t piece, bool wanted,
                                       Ahead<kBits, kOffset, kWide>& ahead) const {
    const uint8_t* const line = codes + int64_t{piece} * (64 * kBits);
#pragma unroll
    for (int i = 0; i < kBits / 4; i++) load_streaming_if(wanted, line + 64 * i, ahead.codes[i]);
    const uint32_t group = multiply_high(2 * static_cast<uint32_t>(piece), group_rate);
    load_if(wanted, scales + uint64_t{group} * (kTile * kScaleBytes), ahead.scales);
    if constexpr (kOffset == Offset::kMinimums) {
      load_if(wanted, offsets + uint64_t{group} * (kTile * kScaleBytes), ahead.minimums);
    }
    if constexpr (kOffset == Offset::kZeros) {
      load_if(wanted, offsets + uint64_t{group} * kTile, ahead.zeros);
    }
  }
};

// Splits x, times the norm's weights, into shared memory, 1,024 columns of n rows at a time, and
// adds up its squares: a thread takes 4 columns of every row, kBatch rows at once. The first batch
// may be loaded ahead.
template <Offset kOffset, int kMost>
struct Splitter {
  static constexpr int kBatch = 2;
  static constexpr bool kLoadsAhead = kMost == 4;  // more rows leave no registers for it

  const LinearArgs& args;
  const int32_t first_x, n;
  const int terms_bytes;
  uint4 first[kBatch], norm;
  float squares[kMost] = {};

  __device__ __forceinline__ Splitter(const LinearArgs& args, int32_t first_x, int32_t n,
                                      int terms_bytes)
      : args(args), first_x(first_x), n(n), terms_bytes(terms_bytes) {}

  // A thread's four columns of a row; 0 behind the last.
  __device__ __forceinline__ uint4 load(const float* row, bool wanted, int32_t chunk) const {
    const int64_t column = int64_t{chunk} * (kChunk * kPiece) + 4 * static_cast<int>(threadIdx.x);
    uint4 x = {0, 0, 0, 0};
    load_if(wanted && column < args.cols, row + column, x);
    return x;
  }
  __device__ __forceinline__ void load_batch(int32_t chunk, int row, uint4 (&batch)[kBatch]) const {
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      batch[i] = load(args.x + (first_x + row + i) * args.cols, row + i < n, chunk);
    }
  }
  __device__ __forceinline__ void load_ahead(int32_t chunk) {
    if constexpr (kLoadsAhead) load_first(chunk);
  }
  __device__ __forceinline__ void load_first(int32_t chunk) {
    load_batch(chunk, 0, first);
    if (args.norm != nullptr) norm = load(args.norm, true, chunk);
  }
  __device__ __forceinline__ void store_row(int i, const uint4& loaded, uint8_t* to) {
    const int thread = static_cast<int>(threadIdx.x);
    const int piece = thread / 8, c = thread % 8 / 2, half = thread % 2;
    float x[4];
#pragma unroll
    for (int j = 0; j < 4; j++) x[j] = bits_float(word_of(loaded, j));
    if (args.norm != nullptr) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        squares[i] += x[j] * x[j];
        x[j] *= bits_float(word_of(norm, j));
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
      if (thread % 8 == 0) reinterpret_cast<float*>(to + terms_bytes)[piece * kMost + i] = sum;
    }
  }
  __device__ __forceinline__ void store(int32_t chunk, uint8_t* to) {
    if constexpr (!kLoadsAhead) load_first(chunk);
#pragma unroll
    for (int row = 0; row < kMost; row += kBatch) {
      if (row >= n) break;
      uint4 batch[kBatch];
      if (row == 0) {
        batch[0] = first[0];
        batch[1] = first[1];
      } else {
        load_batch(chunk, row, batch);
      }
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        if (row + i < n) store_row(row + i, batch[i], to);
      }
    }
  }
};

template <int kBits, Offset kOffset, bool kWide, int kMost>
__global__ void __launch_bounds__(kThreads, kMost <= 8 ? 2 : 1)
    gemv_quantised_kernel(const __grid_constant__ LinearArgs args, int32_t first_x, int32_t n,
                          Shared shared) {
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int g = lane >> 2, c = lane & 3;
  uint8_t* const memory = shared_memory();
  const int32_t n_pieces = static_cast<int32_t>((args.cols + kPiece - 1) / kPiece);
  const int32_t n_chunks = (n_pieces + kChunk - 1) / kChunk;
  const Place<kBits, kOffset, kWide> place(args, g, c);
  int32_t piece = warp * kTurn;  // the first of the turn
  Ahead<kBits, kOffset, kWide> ahead[kAhead<kBits>] = {};
#pragma unroll
  for (int p = 0; p < kAhead<kBits>; p++) place.load(piece + p, piece + p < n_pieces, ahead[p]);

  float sums[2][kTiles<kMost>][4] = {};
  Splitter<kOffset, kMost> splitter(args, first_x, n, shared.terms);
  splitter.load_ahead(0);
  splitter.store(0, memory);
  for (int32_t chunk = 0; chunk < n_chunks; chunk++, piece += kChunk) {
    sync_block();
    const bool more = chunk + 1 < n_chunks;
    if (more) splitter.load_ahead(chunk + 1);
    const uint8_t* const x = memory + chunk % kBuffers<kMost> * shared.chunk;
    const int slot = warp * kTurn;
#pragma unroll
    for (int p = 0; p < kTurn; p++) {
      if (piece + p >= n_pieces) break;
      Ahead<kBits, kOffset, kWide>& mine = ahead[p % kAhead<kBits>];
      uint32_t rows[4][4];
#pragma unroll
      for (int r = 0; r < 4; r++) {
        uint32_t zero = kOffset == Offset::kMinimums ? 0u : 1u << (kBits - 1);
        if constexpr (kOffset == Offset::kZeros) zero = mine.zeros >> (8 * r) & 255u;
        if constexpr (kBits == 4) {
          unpack(word_of(mine.codes[0], r), zero, rows[r]);
        } else {
          unpack(word_of(mine.codes[0], r), word_of(mine.codes[1], r), zero, rows[r]);
        }
      }
      float scale[4], minimum[4];
      floats_of(mine.scales, place.f16, scale);
      if constexpr (kOffset == Offset::kMinimums) floats_of(mine.minimums, place.f16, minimum);
      constexpr int kLast = kTurn - kAhead<kBits>;  // whose successor is of the same turn
      const int32_t next = piece + p + (p < kLast ? kAhead<kBits> : kChunk - kLast);
      place.load(next, next < n_pieces, mine);

#pragma unroll
      for (int t = 0; t < kTiles<kMost>; t++) {
        // Columns of the product that stand for no row of x repeat the last and are not stored.
        const int column = t * kTileX + g % kTileX;
        const int row = column < n ? column : n - 1;
        const uint4 x_columns = *reinterpret_cast<const uint4*>(
            x + (((slot + p) * kTerms + g / kTileX) * n + row) * 64 + c * 16);
        float2 sum_x = {};
        if constexpr (kOffset == Offset::kMinimums) {
          if (2 * c < kTileX) {  // once, with the first terms
            sum_x = *reinterpret_cast<const float2*>(x + shared.terms +
                                                     ((slot + p) * kMost + t * kTileX + 2 * c) * 4);
          }
        }
        float product[2][4] = {};
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const uint32_t b[2] = {half == 0 ? x_columns.x : x_columns.z,
                                 half == 0 ? x_columns.y : x_columns.w};
#pragma unroll
          for (int pair = 0; pair < 2; pair++) {
            const uint32_t(&r0)[4] = rows[2 * pair];
            const uint32_t(&r1)[4] = rows[2 * pair + 1];
            mma_16x8x16<DType::kBF16>(
                product[pair], {r0[2 * half], r1[2 * half], r0[2 * half + 1], r1[2 * half + 1]}, b);
          }
        }
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            float& sum = sums[pair][t][i];
            if constexpr (kOffset == Offset::kMinimums) {
              sum += minimum[2 * pair + i / 2] * (i % 2 == 0 ? sum_x.x : sum_x.y);
            }
            sum += scale[2 * pair + i / 2] * product[pair][i];
          }
        }
      }
    }
    if (!more) break;
    if constexpr (kBuffers<kMost> == 1) sync_block();
    splitter.store(chunk + 1, memory + (chunk + 1) % kBuffers<kMost> * shared.chunk);
  }

  sync_block();
  constexpr int kTileSums = kRows * kColumns, kWarpSums = kTiles<kMost> * kTileSums;
  float* const all_sums = reinterpret_cast<float*>(memory);
  float* const all_squares = reinterpret_cast<float*>(memory + shared.result);
#pragma unroll
  for (int t = 0; t < kTiles<kMost>; t++) {
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = kTile * (g >> 2) + 4 * (g & 3) + 2 * pair + i / 2;
        all_sums[warp * kWarpSums + t * kTileSums + row * kColumns + 2 * c + i % 2] =
            sums[pair][t][i];
      }
    }
  }
  if (args.norm != nullptr) {
#pragma unroll
    for (int i = 0; i < kMost; i++) {
      if (i >= n) break;
      const float sum = warp_sum(splitter.squares[i]);
      if (lane == 0) all_squares[warp * kMost + i] = sum;
    }
  }
  sync_block();
  for (int i = static_cast<int>(threadIdx.x); i < kMost * kRows; i += kThreads) {
    const int row = i % kRows, x = i / kRows;
    if (x >= n) continue;
    const auto over_warps = [&](const float* from, int stride) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; w++) sum += from[w * stride];
      return sum;
    };
    const float scale =
        args.norm != nullptr ? norm_scale(args, over_warps(all_squares + x, kMost)) : 1.0f;
    store_row<kRows>(args, blockIdx.x, row, first_x + x, scale, [&](int r) {
      const float* const from = all_sums + x / kTileX * kTileSums + r * kColumns + x % kTileX;
      return over_warps(from, kWarpSums) + over_warps(from + kTileX, kWarpSums);
    });
  }
}

// Grid: x pairs of rows, y rows of x; one warp each.
__global__ void __launch_bounds__(kWarpSize)
    gemv_codes_kernel(const __grid_constant__ LinearArgs args) {
  constexpr int kPlainRows = 2, kColumns = kCodeColumns;
  const int64_t cols = args.cols;
  const float* const x = args.x + int64_t{blockIdx.y} * cols;
  RowPlace places[kPlainRows];
#pragma unroll
  for (int r = 0; r < kPlainRows; r++) places[r] = row_place<kPlainRows>(args, blockIdx.x, r);
  float sums[kPlainRows] = {}, squares = 0.0f;
  for (int64_t column = lane_id() * kColumns; column < cols; column += kWarpSize * kColumns) {
    float factors[kColumns] = {};
#pragma unroll
    for (int j = 0; j < kColumns; j++) {
      if (column + j >= cols) continue;
      factors[j] = x[column + j];
      if (args.norm == nullptr) continue;
      squares += factors[j] * factors[j];
      factors[j] *= args.norm[column + j];
    }
#pragma unroll
    for (int r = 0; r < kPlainRows; r++) {
      float values[kColumns];
      load_values(*places[r].part, cols, places[r].row, column, values);
#pragma unroll
      for (int j = 0; j < kColumns; j++) sums[r] += values[j] * factors[j];
    }
  }
#pragma unroll
  for (int r = 0; r < kPlainRows; r++) sums[r] = warp_sum(sums[r]);
  squares = warp_sum(squares);
  const int row = lane_id();
  if (row >= kPlainRows) return;
  store_row<kPlainRows>(args, blockIdx.x, row, blockIdx.y,
                        args.norm != nullptr ? norm_scale(args, squares) : 1.0f,
                        [&](int r) { return r == 0 ? sums[0] : sums[1]; });
}

template <int kBits, Offset kOffset, bool kWide>
void run(const LinearArgs& args, Stream stream) {
  const Grid grid{row_groups<kRows>(args)};
  for (int32_t first = 0; first < args.n; first += kGemvRows) {
    const int32_t n = args.n - first < kGemvRows ? args.n - first : kGemvRows;
    const auto start = [&](auto most) {
      constexpr int kMost = decltype(most)::value;
      const Shared shared = shared_of<kMost>(n, kOffset == Offset::kMinimums);
      launch("gemv_quantised", gemv_quantised_kernel<kBits, kOffset, kWide, kMost>, grid, kThreads,
             shared.bytes, stream, args, first, n, shared);
    };
    if (n <= 4) {
      start(std::integral_constant<int, 4>());
    } else if (n <= 8) {
      start(std::integral_constant<int, 8>());
    } else {
      start(std::integral_constant<int, kGemvRows>());
    }
  }
}

template <int kBits, bool kWide>
void run(const LinearArgs& args, Stream stream) {
  switch (args.parts[0].offset) {
    case Offset::kZeros:
      return run<kBits, Offset::kZeros, kWide>(args, stream);
    case Offset::kMinimums:
      if constexpr (kWide) {
        throw Error("gemv: minimums are f16 or bf16");
      } else {
        return run<kBits, Offset::kMinimums, kWide>(args, stream);
      }
    default:
      return run<kBits, Offset::kNone, kWide>(args, stream);
  }
}

template <int kBits>
void run(const LinearArgs& args, Stream stream) {
  if (args.parts[0].scale_dtype == DType::kF32) {
    run<kBits, true>(args, stream);
  } else {
    run<kBits, false>(args, stream);
  }
}

}  // namespace

void gemv_codes_plain(const LinearArgs& args, Stream stream) {
  launch("gemv_codes", gemv_codes_kernel, {row_groups<2>(args), args.n}, kWarpSize, 0, stream,
         args);
}

void gemv_quantised(const LinearArgs& args, Stream stream) {
  if (args.cols % 4 != 0 || reinterpret_cast<uintptr_t>(args.x) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(args.norm) % 16 != 0) {
    gemv_codes_plain(args, stream);
  } else if (args.parts[0].dtype == DType::kInt4) {
    run<4>(args, stream);
  } else {
    run<8>(args, stream);
  }
}

}  // namespace mustafar::cuda
