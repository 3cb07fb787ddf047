// y = W x for few rows of x and W of 8- or 4-bit codes (format/quantised_matrix.h): reads the codes
// once per 8 rows of x and multiplies them on the tensor cores.
//
// A group is two tiles of 16 output rows of one matrix of the launch (gated: one tile of gate and
// the same of up). Grid: as many blocks as there are multiprocessors; a block takes groups in
// turns, and the next group's codes are on their way while it works on this one. Its 16 warps take
// the columns in turns of 128: four pieces of 32. A lane (g, c), with g = lane / 4 and c = lane %
// 4, takes columns 8c to 8c + 7 of a piece and rows 4 (g % 4) to 4 (g % 4) + 3 of tile g / 4:
// neighbours in memory, of which two at a time are rows g and g + 8 of a product. The order of
// columns within a product is free.
//
// A is code - zero, an integer that bf16 holds; B is x, as a sum of two bf16 terms, which holds f32
// to 2^-17: the terms of four rows are the columns of a product. The sum of a piece is in f32; it
// is multiplied by the group's scale and added up along the columns of a warp, then over the warps.
// Of a matrix with minimums, W x is scale (code x) + minimum (sum of x). The order of sums depends
// on the number of columns alone.
//
// A block splits x itself, for all of its warps and groups: all of it once where shared memory
// holds that, else some columns at a time, again for every group. RMSNorm before and SiLU after are
// part of the kernel.
//
// Columns in fours, in rows of whole 16 bytes, are taken by that kernel; any by a plain one, a warp
// for two rows and one row of x.
#include <algorithm>
#include <type_traits>

#include "cuda/code_products.cuh"
#include "cuda/code_values.cuh"
#include "cuda/device_ops.cuh"
#include "cuda/gemv_rows.cuh"
#include "cuda/launch.cuh"
#include "cuda/matrix_ops.cuh"

namespace mustafar::cuda {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kRows = 2 * kTile;  // output rows of a group
constexpr int kColumns = 8;       // of a product: two terms of each of kTileX rows of x
constexpr int kTileX = 4;
constexpr int kMostX = 8;  // rows of x of a pass
constexpr int kTurn = 4;   // pieces of a warp's turn
constexpr int kBlockTurn = kWarps * kTurn;
constexpr int kTerms = 2;

// Pieces whose codes are on their way.
template <int kBits, int kMost>
constexpr int kAhead = kBits == 4 && kMost == kTileX ? 4 : 2;
template <int kMost>
constexpr int kTiles = kMost / kTileX;  // of up to kMost rows of x

// How shared memory is used. In this order: the terms of x [piece][term][row of x][c] uint4; for
// minimums the sums of pieces of x, [piece][kMost] f32; the sums of warps, one or two of
// [warp][tile of x][column][row], the one being read while the next group fills the other; the
// squares of x, [warp][kMost].
struct Shared {
  int32_t turns;    // of the block, whose columns of x are held at once
  int32_t buffers;  // of sums
  int32_t piece_sums, sums, squares, bytes;
};

// What a lane has on the way of a piece: 8 codes of each of 4 rows, and the scales and offsets of
// those. kWide: scales are f32.
template <int kBits, Offset kOffset, bool kWide>
struct Ahead {
  uint4 codes[kBits / 4];
  std::conditional_t<kWide, uint4, uint2> scales;
  uint2 minimums;
  uint32_t zeros;
};

// A lane's rows of a group: four neighbours of one tile.
template <int kBits, Offset kOffset, bool kWide>
struct Place {
  static constexpr int kScaleBytes = kWide ? 4 : 2;

  const uint8_t* codes;    // of the lane's first piece
  const uint8_t* scales;   // of group 0
  const uint8_t* offsets;  // the same
  uint32_t rate;
  bool f16;  // scales and minimums are, else bf16

  __device__ __forceinline__ void move(const LinearArgs& args, const ScaleGroups& groups,
                                       int32_t group, int g, int c) {
    const RowPlace place = row_place<kRows>(args, group, kTile * (g >> 2));
    const LinearPart& part = *place.part;
    const int64_t index = place.part - args.parts;
    const uint32_t tile = static_cast<uint32_t>(place.row) / kTile;
    const uint32_t n_pieces = (static_cast<uint32_t>(args.cols) + kPiece - 1) / kPiece;
    const uint64_t first = uint64_t{tile} * groups.count[index] * kTile + 4 * (g & 3);
    codes = static_cast<const uint8_t*>(part.weights) + uint64_t{tile} * n_pieces * (64 * kBits) +
            c * (16 * kBits) + (g & 3) * 16;
    scales = static_cast<const uint8_t*>(part.scales) + first * kScaleBytes;
    offsets = static_cast<const uint8_t*>(part.offsets) +
              first * (kOffset == Offset::kMinimums ? kScaleBytes : 1);
    rate = groups.rate[index];
    f16 = part.scale_dtype == DType::kF16;
  }
  __device__ __forceinline__ void load(int32_t piece, bool wanted,
                                       Ahead<kBits, kOffset, kWide>& ahead) const {
    const uint8_t* const line = codes + int64_t{piece} * (64 * kBits);
#pragma unroll
    for (int i = 0; i < kBits / 4; i++) load_streaming_if(wanted, line + 64 * i, ahead.codes[i]);
    const uint32_t group = scale_group(piece, rate);
    load_if(wanted, scales + uint64_t{group} * (kTile * kScaleBytes), ahead.scales);
    if constexpr (kOffset == Offset::kMinimums) {
      load_if(wanted, offsets + uint64_t{group} * (kTile * kScaleBytes), ahead.minimums);
    }
    if constexpr (kOffset == Offset::kZeros) {
      load_if(wanted, offsets + uint64_t{group} * kTile, ahead.zeros);
    }
  }
};

// A thread's four columns of a row of x as two terms, and for minimums the sum of a piece of them.
template <Offset kOffset, int kMost>
__device__ __forceinline__ void store_terms(const float (&x)[4], int32_t n, int32_t slot, int row,
                                            const Shared& shared, uint8_t* memory) {
  const int thread = static_cast<int>(threadIdx.x);
  const int piece = slot * kBlockTurn + thread / 8, c = thread % 8 / 2, half = thread % 2;
  uint32_t high[2], low[2];
#pragma unroll
  for (int j = 0; j < 2; j++) {
    high[j] = pack2<DType::kBF16>(x[j], x[j + 2]);
    low[j] = pack2<DType::kBF16>(x[j] - bf16_float(static_cast<uint16_t>(high[j])),
                                 x[j + 2] - bf16_float(static_cast<uint16_t>(high[j] >> 16)));
  }
  uint2* const words =
      reinterpret_cast<uint2*>(memory) + ((piece * kTerms * n + row) * 4 + c) * 2 + half;
  words[0] = {high[0], high[1]};
  words[n * 4 * 2] = {low[0], low[1]};
  if constexpr (kOffset == Offset::kMinimums) {
    float sum = x[0] + x[1] + x[2] + x[3];
#pragma unroll
    for (int m = 1; m < 8; m *= 2) sum += shuffle_xor(sum, m);
    if (thread % 8 == 0) {
      reinterpret_cast<float*>(memory + shared.piece_sums)[piece * kMost + row] = sum;
    }
  }
}

// Splits a turn's columns of x, times the norm's weights, into shared memory, unless kSquaresAlone,
// and adds up their squares: a thread takes 4 columns of every row. Columns behind the last are 0.
template <Offset kOffset, int kMost, bool kSquaresAlone>
__device__ __forceinline__ void split_turn(const LinearArgs& args, int32_t first_x, int32_t n,
                                           int32_t turn, int32_t slot, const Shared& shared,
                                           uint8_t* memory, float (&squares)[kMost]) {
  constexpr int kBatch = 2;  // rows at once
  const int64_t column = int64_t{turn} * (kBlockTurn * kPiece) + 4 * static_cast<int>(threadIdx.x);
  const bool inside = column < args.cols;
  uint4 norm = {0, 0, 0, 0};
  if (args.norm != nullptr) load_if(inside, args.norm + column, norm);
#pragma unroll
  for (int row = 0; row < kMost; row += kBatch) {
    if (row >= n) break;
    uint4 loaded[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      loaded[i] = {0, 0, 0, 0};
      load_if(inside && row + i < n, args.x + (first_x + row + i) * args.cols + column, loaded[i]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      if (row + i >= n) break;
      float x[4];
#pragma unroll
      for (int j = 0; j < 4; j++) x[j] = bits_float(word_of(loaded[i], j));
      if (args.norm != nullptr) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          squares[row + i] += x[j] * x[j];
          x[j] *= bits_float(word_of(norm, j));
        }
      }
      if constexpr (!kSquaresAlone) {
        store_terms<kOffset, kMost>(x, n, slot, row + i, shared, memory);
      }
    }
  }
}

template <int kBits, Offset kOffset, bool kWide, int kMost>
__global__ void __launch_bounds__(kThreads, 1)
    gemv_quantised_kernel(const __grid_constant__ LinearArgs args,
                          const __grid_constant__ ScaleGroups groups, int32_t n_groups,
                          int32_t first_x, int32_t n, Shared shared) {
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int g = lane >> 2, c = lane & 3;
  uint8_t* const memory = shared_memory();
  float* const all_sums = reinterpret_cast<float*>(memory + shared.sums);
  float* const all_squares = reinterpret_cast<float*>(memory + shared.squares);
  const int32_t n_pieces = static_cast<int32_t>((args.cols + kPiece - 1) / kPiece);
  const int32_t n_turns = (n_pieces + kBlockTurn - 1) / kBlockTurn;
  const bool resident = shared.turns >= n_turns;

  int32_t group = static_cast<int32_t>(blockIdx.x);
  Place<kBits, kOffset, kWide> place;
  place.move(args, groups, group, g, c);
  Ahead<kBits, kOffset, kWide> ahead[kAhead<kBits, kMost>] = {};
#pragma unroll
  for (int p = 0; p < kAhead<kBits, kMost>; p++) {
    place.load(warp * kTurn + p, warp * kTurn + p < n_pieces, ahead[p]);
  }
  {
    float squares[kMost] = {};
    if (resident) {
      for (int32_t turn = 0; turn < n_turns; turn++) {
        split_turn<kOffset, kMost, false>(args, first_x, n, turn, turn, shared, memory, squares);
      }
    } else if (args.norm != nullptr) {
      for (int32_t turn = 0; turn < n_turns; turn++) {
        split_turn<kOffset, kMost, true>(args, first_x, n, turn, turn, shared, memory, squares);
      }
    }
    if (args.norm != nullptr) {
#pragma unroll
      for (int i = 0; i < kMost; i++) {
        if (i >= n) break;
        const float sum = warp_sum(squares[i]);
        if (lane == 0) all_squares[warp * kMost + i] = sum;
      }
    }
    sync_block();
  }

  for (int32_t round = 0; group < n_groups; round++) {
    const int32_t next_group = group + static_cast<int32_t>(gridDim.x);
    float sums[2][kTiles<kMost>][4] = {};
    for (int32_t turn = 0; turn < n_turns; turn++) {
      if (!resident && turn % shared.turns == 0) {
        sync_block();
        float squares[kMost] = {};  // known, and not used
        for (int32_t i = 0; i < shared.turns && turn + i < n_turns; i++) {
          split_turn<kOffset, kMost, false>(args, first_x, n, turn + i, i, shared, memory, squares);
        }
        sync_block();
      }
      const bool last = turn + 1 == n_turns;
      const int32_t slot = (resident ? turn : turn % shared.turns) * kBlockTurn + warp * kTurn;
      const bool f16 = place.f16;
#pragma unroll
      for (int p = 0; p < kTurn; p++) {
        Ahead<kBits, kOffset, kWide>& mine = ahead[p % kAhead<kBits, kMost>];
        uint4 x[kTiles<kMost>];
        float2 sum_x[kTiles<kMost>];
#pragma unroll
        for (int t = 0; t < kTiles<kMost>; t++) {
          // Columns of the product that stand for no row of x repeat the last and are not stored.
          const int column = t * kTileX + g % kTileX;
          const int row = column < n ? column : n - 1;
          x[t] = *reinterpret_cast<const uint4*>(
              memory + (((slot + p) * kTerms + g / kTileX) * n + row) * 64 + c * 16);
          if constexpr (kOffset == Offset::kMinimums) {
            sum_x[t] = {};
            if (2 * c < kTileX) {  // once, with the first terms
              sum_x[t] = *reinterpret_cast<const float2*>(
                  memory + shared.piece_sums + ((slot + p) * kMost + t * kTileX + 2 * c) * 4);
            }
          }
        }
        float scale[4], minimum[4];
        floats_of(mine.scales, f16, scale);
        if constexpr (kOffset == Offset::kMinimums) floats_of(mine.minimums, f16, minimum);
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
          uint32_t rows[2][4];
          unpack_pair<kBits, kOffset>(mine.codes, mine.zeros, pair, rows);
#pragma unroll
          for (int t = 0; t < kTiles<kMost>; t++) {
            float product[4] = {};
            mma_16x8x16<DType::kBF16>(product, {rows[0][0], rows[1][0], rows[0][1], rows[1][1]},
                                      {x[t].x, x[t].y});
            mma_16x8x16<DType::kBF16>(product, {rows[0][2], rows[1][2], rows[0][3], rows[1][3]},
                                      {x[t].z, x[t].w});
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
        // The piece that takes its place: of this turn, of the next, or of the next group.
        constexpr int kSame = kTurn - kAhead<kBits, kMost>;
        if (p == kSame && last && next_group < n_groups) {
          place.move(args, groups, next_group, g, c);
        }
        const int32_t next =
            warp * kTurn + (p < kSame ? turn * kBlockTurn + p + kAhead<kBits, kMost>
                                      : (last ? 0 : turn + 1) * kBlockTurn + p - kSame);
        place.load(next, next < n_pieces && (p < kSame || !last || next_group < n_groups), mine);
      }
    }

    constexpr int kTileSums = kRows * kColumns, kWarpSums = kTiles<kMost> * kTileSums;
    float* const these = all_sums + round % shared.buffers * (kWarps * kWarpSums);
    if (shared.buffers == 1 && round > 0) sync_block();
#pragma unroll
    for (int t = 0; t < kTiles<kMost>; t++) {
#pragma unroll
      for (int pair = 0; pair < 2; pair++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int row = kTile * (g >> 2) + 4 * (g & 3) + 2 * pair + i / 2;
          these[warp * kWarpSums + t * kTileSums + (2 * c + i % 2) * kRows + row] =
              sums[pair][t][i];
        }
      }
    }
    sync_block();
    // A warp for a row of x, others for the next group's.
    for (int x = 0; x < n; x++) {
      if ((round * n + x) % kWarps != warp) continue;
      const float scale =
          args.norm != nullptr ? norm_scale(args, sum_apart<kWarps>(all_squares + x, kMost)) : 1.0f;
      store_row<kRows>(args, group, lane, first_x + x, scale, [&](int r) {
        const float* const from = these + x / kTileX * kTileSums + x % kTileX * kRows + r;
        return sum_apart<kWarps>(from, kWarpSums) +
               sum_apart<kWarps>(from + kTileX * kRows, kWarpSums);
      });
    }
    group = next_group;
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

// Of n rows of x; kMost >= n. Rather all of x than two buffers of sums, where it can't be both.
template <int kMost>
Shared shared_of(int32_t n, int64_t cols, bool minimums, int32_t most_bytes) {
  const int32_t sums = kWarps * kTiles<kMost> * kRows * kColumns * 4;
  const int32_t squares = kWarps * kMost * 4;
  const int32_t terms = kBlockTurn * kTerms * n * 64;  // a turn's
  const int32_t piece_sums = minimums ? kBlockTurn * kMost * 4 : 0;
  const int32_t n_turns =
      static_cast<int32_t>((cols + kBlockTurn * kPiece - 1) / (kBlockTurn * kPiece));
  const auto turns_beside = [&](int32_t buffers) {
    return std::min(n_turns, (most_bytes - squares - buffers * sums) / (terms + piece_sums));
  };
  Shared shared;
  shared.buffers = turns_beside(1) > turns_beside(2) ? 1 : 2;
  shared.turns = turns_beside(shared.buffers);
  shared.piece_sums = shared.turns * terms;
  shared.sums = shared.piece_sums + shared.turns * piece_sums;
  shared.squares = shared.sums + shared.buffers * sums;
  shared.bytes = shared.squares + squares;
  return shared;
}

template <int kBits, Offset kOffset, bool kWide>
void run(const LinearArgs& args, Stream stream) {
  const DeviceProperties& device = device_properties();
  const int32_t n_groups = static_cast<int32_t>(row_groups<kRows>(args));
  const Grid grid{std::min(n_groups, device.n_multiprocessors)};
  const ScaleGroups groups = scale_groups(args);
  for (int32_t first = 0; first < args.n; first += kMostX) {
    const int32_t n = std::min(args.n - first, kMostX);
    const auto start = [&](auto most) {
      constexpr int kMost = decltype(most)::value;
      const Shared shared =
          shared_of<kMost>(n, args.cols, kOffset == Offset::kMinimums, device.max_shared_bytes);
      launch("gemv_quantised", gemv_quantised_kernel<kBits, kOffset, kWide, kMost>, grid, kThreads,
             shared.bytes, stream, args, groups, n_groups, first, n, shared);
    };
    if (n <= kTileX) {
      start(std::integral_constant<int, kTileX>());
    } else {
      start(std::integral_constant<int, kMostX>());
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
