// y = W x for some tens of rows of x and W of 8- or 4-bit codes (format/quantised_matrix.h): every
// code is read and unpacked once for up to 64 rows of x, and multiplied on the tensor cores.
//
// Three kernels. The first splits x, times the norm's weights, into two bf16 terms, which hold f32
// to 2^-17, and writes them in the order of B operands. The second multiplies. The third adds up
// what several blocks have of a sum, and does RMSNorm's scale, bias and SiLU.
//
// The second: a block takes kRowWarps groups of 32 output rows, a row block, and the columns in
// steps of 128. All steps of all row blocks, one row block's after the other's, are dealt out to
// the blocks in equal runs of neighbours. The next stages of codes, scales and x are on their way
// to shared memory (cp.async) while this one is multiplied. A warp takes one group of rows and all
// rows of x. As in gemv_quantised.cu, lane (g, c), g = lane
// / 4 and c = lane % 4, unpacks columns 8c to 8c + 7 of a piece of 32 and rows 4g to 4g + 3 of the
// group's two tiles, of which two at a time are rows g and g + 8 of a product: A is code - zero, B
// the terms of 8 rows of x, of which the second adds to the first's product. A piece's sum is
// multiplied by its scale and added up in f32; of a matrix with minimums, so is minimum (sum of x).
//
// The order of sums depends on the matrices' shapes and the number of multiprocessors, not on how
// many rows of x there are.
//
// Shared, for each stage: codes [row warp][piece][16 bytes of a lane], scales and offsets [row
// warp][piece][row]; x as it lies in memory, for each piece terms [8 rows of x][term][lane] uint4
// and sums [row of x] f32.
#include <algorithm>
#include <type_traits>

#include "cuda/async_copy.cuh"
#include "cuda/code_products.cuh"
#include "cuda/gemv_rows.cuh"
#include "cuda/launch.cuh"
#include "cuda/matrix_ops.cuh"

namespace mustafar::cuda {
namespace {

constexpr int kRows = 2 * kTile;  // output rows of a warp
constexpr int kRowWarps = 8;
constexpr int kThreads = kRowWarps * kWarpSize;
constexpr int kTileX = 8;  // rows of x of a product
constexpr int kTerms = 2;
constexpr int kStepPieces = 4;
constexpr int kStepColumns = kStepPieces * kPiece;
constexpr int kMaxTiles = 8;  // of rows of x in a pass
constexpr int kMostX = kMaxTiles * kTileX;
constexpr int kMaxSlots = 6;  // of stages in shared memory
constexpr int kShares = 2;    // of the work, for every multiprocessor
// Blocks that a multiprocessor holds, and shares of each: registers do not allow two blocks of many
// rows of x.
template <int kTiles>
constexpr int kResident = kTiles == kMaxTiles ? 1 : kShares;
template <int kTiles>
constexpr int kBlockShares = kShares / kResident<kTiles>;

constexpr int kTermBytes = kTerms * kWarpSize * 16;  // of a piece and tile of rows of x
constexpr int kTileBytes = kTermBytes + kTileX * 4;  // the same with its sums
constexpr int kSplitThreads = 256, kSplitColumns = 4 * kSplitThreads;
static_assert(kStepColumns == 4 * kWarpSize);

// How the product is dealt out: units, which are steps of row blocks, in equal shares.
struct Deal {
  int32_t n_groups;      // of 32 output rows
  int32_t n_row_blocks;  // of groups
  int32_t n_steps;       // of 128 columns
  int32_t n_shares;
  int32_t n_pieces;  // of 32 columns

  __device__ __forceinline__ uint32_t n_units() const {
    return uint32_t(n_row_blocks) * uint32_t(n_steps);
  }
  __device__ __forceinline__ int32_t first_unit(int32_t share) const {
    return static_cast<int32_t>(uint32_t(share) * n_units() / uint32_t(n_shares));
  }
  __device__ __forceinline__ int32_t share_of(int32_t unit) const {
    return static_cast<int32_t>((uint32_t(unit + 1) * uint32_t(n_shares) - 1) / n_units());
  }
  // A share's part of a row block's sums: of the two numbers one or both go up by one, never less.
  __device__ __forceinline__ int64_t segment(int32_t share, int32_t row_block) const {
    return int64_t{share} + row_block;
  }
  int64_t n_segments() const { return int64_t{n_shares} + n_row_blocks - 1; }
};

constexpr int offset_bytes(Offset offset) {
  return offset == Offset::kMinimums ? 2 : offset == Offset::kZeros ? 1 : 0;
}

// A stage in shared memory: a step of a row block, or half of one where two whole ones are more
// than some GPUs give a block.
template <int kBits, Offset kOffset, bool kWide, int kTiles>
struct Stage {
  static constexpr int kScaleBytes = kWide ? 4 : 2;
  static constexpr int kPieceCodes = kRows * kPiece * kBits / 8;  // of a row warp
  static constexpr int kPieceBytes =
      kRowWarps * (kPieceCodes + kRows * (kScaleBytes + offset_bytes(kOffset))) +
      kTiles * kTileBytes;
  static constexpr int kPieces =
      2 * kStepPieces * kPieceBytes <= (99 << 10) ? kStepPieces : kStepPieces / 2;
  static constexpr int kRowPieces = kRowWarps * kPieces;
  static constexpr int kScales = kRowPieces * kPieceCodes;
  static constexpr int kOffsets = kScales + kRowPieces * kRows * kScaleBytes;
  static constexpr int kX = kOffsets + kRowPieces * kRows * offset_bytes(kOffset);
  static constexpr int kBytes = kPieces * kPieceBytes;
};

// Scratch in global memory.
struct Scratch {
  uint8_t* x;       // [piece]: terms [tile], sums [tile]
  float* squares;   // [row of x][step]
  float* partials;  // [segment][row warp][row of x][32 rows]
};

// Grid: x slices of 1,024 columns, y rows of x and, to fill up tiles, zeros; a thread takes 4
// columns.
__global__ void __launch_bounds__(kSplitThreads)
    split_rows_kernel(const __grid_constant__ LinearArgs args, int32_t first_x, int32_t n,
                      int32_t n_tiles, int32_t n_steps, const __grid_constant__ Scratch scratch) {
  const int thread = static_cast<int>(threadIdx.x), row = static_cast<int>(blockIdx.y);
  const int64_t column = int64_t{blockIdx.x} * kSplitColumns + 4 * thread;
  const int32_t step = static_cast<int32_t>(column / kStepColumns);
  if (step >= n_steps) return;  // a whole warp
  const bool inside = row < n && column < args.cols;
  uint4 loaded = {0, 0, 0, 0};
  load_if(inside, args.x + (first_x + row) * args.cols + column, loaded);
  float x[4] = {bits_float(loaded.x), bits_float(loaded.y), bits_float(loaded.z),
                bits_float(loaded.w)};
  if (args.norm != nullptr) {
    uint4 norm = {0, 0, 0, 0};
    load_if(inside, args.norm + column, norm);
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      squares += x[j] * x[j];
      x[j] *= bits_float(word_of(norm, j));
    }
    squares = warp_sum(squares);
    if (thread % kWarpSize == 0) scratch.squares[int64_t{row} * n_steps + step] = squares;
  }
  uint32_t high[2], low[2];
#pragma unroll
  for (int j = 0; j < 2; j++) {
    high[j] = pack2<DType::kBF16>(x[j], x[j + 2]);
    low[j] = pack2<DType::kBF16>(x[j] - bf16_float(static_cast<uint16_t>(high[j])),
                                 x[j + 2] - bf16_float(static_cast<uint16_t>(high[j] >> 16)));
  }
  const int c = thread % 8 / 2, half = thread % 2, tile = row / kTileX, g = row % kTileX;
  uint8_t* const piece = scratch.x + column / kPiece * (n_tiles * kTileBytes);
  uint2* const words = reinterpret_cast<uint2*>(piece + tile * kTermBytes) + (4 * g + c) * 2 + half;
  words[0] = {high[0], high[1]};
  words[kWarpSize * 2] = {low[0], low[1]};
  float sum = x[0] + x[1] + x[2] + x[3];
#pragma unroll
  for (int m = 1; m < 8; m *= 2) sum += shuffle_xor(sum, m);
  if (thread % 8 == 0) reinterpret_cast<float*>(piece + n_tiles * kTermBytes)[row] = sum;
}

// Where a lane's copies of a row block come from.
template <int kBits, Offset kOffset, bool kWide>
struct Source {
  const uint8_t* codes;    // of the lane's share of piece 0
  const uint8_t* scales;   // of group 0, four rows
  const uint8_t* offsets;  // the same
  uint32_t rate;

  __device__ __forceinline__ void move(const LinearArgs& args, const ScaleGroups& groups,
                                       int32_t group, int32_t n_pieces) {
    const int lane = lane_id(), g = lane >> 2, c = lane & 3;
    const RowPlace place = row_place<kRows>(args, group, kTile * (g >> 2));
    codes = static_cast<const uint8_t*>(place.part->weights) +
            (place.row / kTile * n_pieces) * (64 * kBits) + c * (16 * kBits) + (g & 3) * 16;
    // Lanes of another order: [piece][tile][four rows].
    const RowPlace scaled = row_place<kRows>(args, group, kTile * (lane % 8 / 4));
    const int64_t index = scaled.part - args.parts;
    const int64_t first =
        scaled.row / kTile * int64_t{groups.count[index]} * kTile + 4 * (lane % 4);
    scales = static_cast<const uint8_t*>(scaled.part->scales) + first * (kWide ? 4 : 2);
    offsets = static_cast<const uint8_t*>(scaled.part->offsets) +
              first * (kOffset == Offset::kMinimums ? 2 : 1);
    rate = groups.rate[index];
  }
};

// kWide: scales are f32. kTiles: of 8 rows of x each.
template <int kBits, Offset kOffset, bool kWide, int kTiles>
__global__ void __launch_bounds__(kThreads, kResident<kTiles>)
    gemm_quantised_kernel(const __grid_constant__ LinearArgs args,
                          const __grid_constant__ ScaleGroups groups,
                          const __grid_constant__ Deal deal,
                          const __grid_constant__ Scratch scratch, int32_t n, int32_t n_slots) {
  using Layout = Stage<kBits, kOffset, kWide, kTiles>;
  constexpr int kAtOnce = 2;  // tiles of x that are multiplied at once, to have products in flight
  // Pieces that registers allow to be.
  [[maybe_unused]] constexpr int kUnrolled = kTiles <= 2 && kOffset != Offset::kZeros && !kWide ? 4
                                             : kTiles <= 2 || kTiles == 8                       ? 2
                                                                                                : 1;
  constexpr int kWords = kBits / 4;  // uint4 of a lane's share of a piece
  constexpr int kPieces = Layout::kPieces, kScaleBytes = Layout::kScaleBytes;
  static_assert(kTiles % kAtOnce == 0);
  const int lane = lane_id(), row_warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int g = lane >> 2, c = lane & 3;
  uint8_t* const memory = shared_memory();
  // In stages from here on.
  constexpr int kSplitSteps = kStepPieces / kPieces;
  const int32_t n_stages = deal.n_steps * kSplitSteps;
  const auto first_of = [&](int32_t share) { return deal.first_unit(share) * kSplitSteps; };
  // The block's shares, neighbours.
  constexpr int kOwn = kBlockShares<kTiles>;
  int32_t share = static_cast<int32_t>(blockIdx.x) * kOwn;
  const int32_t first = first_of(share);
  const int32_t end = first_of(share + kOwn < deal.n_shares ? share + kOwn : deal.n_shares);
  int32_t share_end = first_of(share + 1);
  const auto group_of = [&](int32_t row_block) { return row_block * kRowWarps + row_warp; };

  // What comes next to shared memory.
  int32_t load_row_block = first / n_stages, load_stage = first % n_stages;
  int load_slot = 0;
  Source<kBits, kOffset, kWide> source;
  const auto move = [&] {
    const int32_t group = group_of(load_row_block);
    source.move(args, groups, group < deal.n_groups ? group : deal.n_groups - 1, deal.n_pieces);
  };
  const auto load = [&] {
    uint8_t* const to = memory + load_slot * Layout::kBytes;
    // Pieces behind the last repeat it, and meet zeros of x.
    const auto piece_of = [&](int p) {
      const int32_t piece = load_stage * kPieces + p;
      return piece < deal.n_pieces ? piece : deal.n_pieces - 1;
    };
#pragma unroll
    for (int p = 0; p < kPieces; p++) {
      const uint8_t* const line = source.codes + static_cast<uint32_t>(piece_of(p)) * (64u * kBits);
#pragma unroll
      for (int j = 0; j < kWords; j++) {
        cp_async16(
            to + (row_warp * kPieces + p) * Layout::kPieceCodes + (j * kWarpSize + lane) * 16,
            line + 64 * j);
      }
    }
    const int at = row_warp * (kPieces * kRows) + 4 * lane;  // of the lane's four rows
    const uint32_t from = scale_group(piece_of(lane / 8), source.rate) * kTile;
    if (lane < 8 * kPieces) {
      if constexpr (kWide) {
        cp_async16(to + Layout::kScales + at * 4, source.scales + from * 4);
      } else {
        cp_async_few<8>(to + Layout::kScales + at * 2, source.scales + from * 2);
      }
      if constexpr (kOffset == Offset::kMinimums) {
        cp_async_few<8>(to + Layout::kOffsets + at * 2, source.offsets + from * 2);
      }
      if constexpr (kOffset == Offset::kZeros) {
        cp_async_few<4>(to + Layout::kOffsets + at, source.offsets + from);
      }
    }
    constexpr int kCopies = kPieces * kTiles * kTileBytes / 16;
    const uint8_t* const x =
        scratch.x + static_cast<uint32_t>(load_stage) * uint32_t{kPieces * kTiles * kTileBytes};
#pragma unroll
    for (int i = 0; i < (kCopies + kThreads - 1) / kThreads; i++) {
      const int copy = i * kThreads + static_cast<int>(threadIdx.x);
      if ((i + 1) * kThreads <= kCopies || copy < kCopies) {
        cp_async16(to + Layout::kX + copy * 16, x + copy * 16);
      }
    }
    load_slot = load_slot + 1 == n_slots ? 0 : load_slot + 1;
    if (++load_stage == n_stages) {
      load_stage = 0;
      load_row_block++;
    }
  };
  move();
  for (int i = 0; i + 1 < n_slots; i++) {
    if (i > 0 && load_stage == 0) move();
    if (first + i < end) load();
    cp_async_commit();
  }

  int32_t row_block = first / n_stages, stage = first % n_stages;
  int slot = 0;
  bool f16 = false;  // scales and minimums of the lane's rows are, else bf16
  const auto see_type = [&] {
    const int32_t group = group_of(row_block);
    const RowPlace place =
        row_place<kRows>(args, group < deal.n_groups ? group : deal.n_groups - 1, kTile * (g >> 2));
    f16 = place.part->scale_dtype == DType::kF16;
  };
  see_type();
  float sums[2][kTiles][4] = {};
  for (int32_t unit = first; unit < end; unit++) {
    // All but the newest n_slots - 2.
    if (n_slots >= 6) {
      cp_async_wait<4>();
    } else if (n_slots == 5) {
      cp_async_wait<3>();
    } else if (n_slots == 4) {
      cp_async_wait<2>();
    } else if (n_slots == 3) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    sync_block();
    if (unit + n_slots - 1 < end) {
      if (load_stage == 0) move();
      load();
    }
    cp_async_commit();

    const uint8_t* const here = memory + slot * Layout::kBytes;
#pragma unroll kUnrolled
    for (int p = 0; p < kPieces; p++) {
      const int piece = row_warp * kPieces + p;
      uint4 codes[kWords];
#pragma unroll
      for (int j = 0; j < kWords; j++) {
        codes[j] = *reinterpret_cast<const uint4*>(here + piece * Layout::kPieceCodes +
                                                   (j * kWarpSize + lane) * 16);
      }
      const int at = piece * kRows + 4 * g;
      float scale[4], minimum[4];
      using Scales = std::conditional_t<kWide, uint4, uint2>;
      floats_of(*reinterpret_cast<const Scales*>(here + Layout::kScales + at * kScaleBytes), f16,
                scale);
      uint32_t zeros = 0;
      if constexpr (kOffset == Offset::kMinimums) {
        floats_of(*reinterpret_cast<const uint2*>(here + Layout::kOffsets + at * 2), f16, minimum);
      }
      if constexpr (kOffset == Offset::kZeros) {
        zeros = *reinterpret_cast<const uint32_t*>(here + Layout::kOffsets + at);
      }
      uint32_t a[2][2][4];  // [rows 2 pair, 2 pair + 1][product of 16 columns]
#pragma unroll
      for (int pair = 0; pair < 2; pair++) {
        uint32_t rows[2][4];
        unpack_pair<kBits, kOffset>(codes, zeros, pair, rows);
#pragma unroll
        for (int k = 0; k < 2; k++) {
#pragma unroll
          for (int i = 0; i < 4; i++) a[pair][k][i] = rows[i % 2][2 * k + i / 2];
        }
      }
      const uint8_t* const tiles = here + Layout::kX + p * (kTiles * kTileBytes);
      const uint4* const x = reinterpret_cast<const uint4*>(tiles) + lane;
      const float* const sums_x =
          reinterpret_cast<const float*>(tiles + kTiles * kTermBytes) + 2 * c;
#pragma unroll
      for (int t = 0; t < kTiles; t += kAtOnce) {
        uint4 b[kAtOnce][kTerms];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
#pragma unroll
          for (int term = 0; term < kTerms; term++) {
            b[i][term] = x[((t + i) * kTerms + term) * kWarpSize];
          }
        }
        float product[kAtOnce][2][4] = {};
#pragma unroll
        for (int term = 0; term < kTerms; term++) {
#pragma unroll
          for (int k = 0; k < 2; k++) {
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) {
              const uint4& words = b[i][term];
              const uint32_t operand[2] = {k == 0 ? words.x : words.z, k == 0 ? words.y : words.w};
#pragma unroll
              for (int pair = 0; pair < 2; pair++) {
                mma_16x8x16<DType::kBF16>(product[i][pair], a[pair][k], operand);
              }
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
          float2 sum_x = {};
          if constexpr (kOffset == Offset::kMinimums) {
            sum_x = *reinterpret_cast<const float2*>(sums_x + (t + i) * kTileX);
          }
#pragma unroll
          for (int pair = 0; pair < 2; pair++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
              float& sum = sums[pair][t + i][j];
              if constexpr (kOffset == Offset::kMinimums) {
                sum += minimum[2 * pair + j / 2] * (j % 2 == 0 ? sum_x.x : sum_x.y);
              }
              sum += scale[2 * pair + j / 2] * product[i][pair][j];
            }
          }
        }
      }
    }
    slot = slot + 1 == n_slots ? 0 : slot + 1;

    if (++stage < n_stages && unit + 1 < share_end) continue;
    const bool exists = group_of(row_block) < deal.n_groups;
    float* const partials =
        scratch.partials +
        (deal.segment(share, row_block) * kRowWarps + row_warp) * int64_t{n} * kRows + 4 * g;
#pragma unroll
    for (int t = 0; t < kTiles; t++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int column = t * kTileX + 2 * c + i;
        if (exists && column < n) {
          *reinterpret_cast<float4*>(partials + column * kRows) = {
              sums[0][t][i], sums[0][t][2 + i], sums[1][t][i], sums[1][t][2 + i]};
        }
        sums[0][t][i] = sums[0][t][2 + i] = sums[1][t][i] = sums[1][t][2 + i] = 0.0f;
      }
    }
    if (stage == n_stages) {
      stage = 0;
      row_block++;
      see_type();
    }
    if (unit + 1 == share_end && unit + 1 < end) share_end = first_of(++share + 1);
  }
  cp_async_wait<0>();
}

constexpr int kFinishWarps = 8, kFinishRows = 2 * kFinishWarps;

// Grid: x groups, y sixteens of rows of x; a warp for two of them.
__global__ void __launch_bounds__(kFinishWarps* kWarpSize)
    add_partials_kernel(const __grid_constant__ LinearArgs args, const __grid_constant__ Deal deal,
                        const __grid_constant__ Scratch scratch, int32_t first_x, int32_t n) {
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int32_t group = static_cast<int32_t>(blockIdx.x), row_block = group / kRowWarps;
  const int32_t first = deal.share_of(row_block * deal.n_steps);
  const int32_t last = deal.share_of((row_block + 1) * deal.n_steps - 1);
  const int64_t stride = int64_t{kRowWarps} * n * kRows;  // of segments
  const float* const partials = scratch.partials + deal.segment(first, row_block) * stride +
                                int64_t{group % kRowWarps} * n * kRows;
  for (int i = 0; i < kFinishRows / kFinishWarps; i++) {
    const int32_t x = static_cast<int32_t>(blockIdx.y) * kFinishRows + i * kFinishWarps + warp;
    if (x >= n) return;
    float scale = 1.0f;
    if (args.norm != nullptr) {
      float squares = 0.0f;
      for (int32_t s = lane; s < deal.n_steps; s += kWarpSize) {
        squares += scratch.squares[int64_t{x} * deal.n_steps + s];
      }
      scale = norm_scale(args, warp_sum(squares));
    }
    store_row<kRows>(args, group, lane, first_x + x, scale, [&](int r) {
      float sum = 0.0f;
      for (int32_t i = 0; i <= last - first; i++) sum += partials[i * stride + x * kRows + r];
      return sum;
    });
  }
}

// Stages of a block in shared memory.
int32_t slots_of(int stage_bytes, int resident) {
  const int32_t most = device_properties().max_shared_bytes;
  const int32_t share = most / resident - (resident > 1 ? 1024 : 0);
  return std::min(kMaxSlots, (share >= 2 * stage_bytes ? share : most) / stage_bytes);
}

Deal deal_of(const LinearArgs& args) {
  Deal deal;
  deal.n_groups = static_cast<int32_t>(row_groups<kRows>(args));
  deal.n_row_blocks = (deal.n_groups + kRowWarps - 1) / kRowWarps;
  deal.n_pieces = static_cast<int32_t>((args.cols + kPiece - 1) / kPiece);
  deal.n_steps = static_cast<int32_t>((args.cols + kStepColumns - 1) / kStepColumns);
  deal.n_shares =
      std::min(deal.n_row_blocks * deal.n_steps, kShares * device_properties().n_multiprocessors);
  return deal;
}

int64_t rounded_up(int64_t bytes) { return (bytes + 127) / 128 * 128; }

struct ScratchBytes {
  int64_t x, squares, partials;
  ScratchBytes(const Deal& deal, int32_t n) {
    x = rounded_up(int64_t{deal.n_steps} * kStepPieces * kMaxTiles * kTileBytes);
    squares = rounded_up(int64_t{deal.n_steps} * kMostX * 4);
    partials = deal.n_segments() * kRowWarps * std::min(n, kMostX) * kRows * 4;
  }
};

template <int kBits, Offset kOffset, bool kWide>
void run(const LinearArgs& args, void* memory, Stream stream) {
  const Deal deal = deal_of(args);
  const ScaleGroups groups = scale_groups(args);
  const ScratchBytes bytes(deal, args.n);
  uint8_t* const base = static_cast<uint8_t*>(memory);
  const Scratch scratch{base, reinterpret_cast<float*>(base + bytes.x),
                        reinterpret_cast<float*>(base + bytes.x + bytes.squares)};
  // Returns how many rows of x it has taken, none where they do not fit.
  const auto pass = [&](int32_t first, auto tiles) {
    constexpr int kTiles = decltype(tiles)::value;
    constexpr int kStageBytes = Stage<kBits, kOffset, kWide, kTiles>::kBytes;
    constexpr int kOwn = kBlockShares<kTiles>;
    const int32_t n_slots = slots_of(kStageBytes, kResident<kTiles>);
    if (n_slots < 2) return 0;
    const int32_t n = std::min(args.n - first, kTiles * kTileX);
    launch("split_rows", split_rows_kernel,
           {(int64_t{deal.n_steps} * kStepColumns + kSplitColumns - 1) / kSplitColumns,
            kTiles * kTileX},
           kSplitThreads, 0, stream, args, first, n, kTiles, deal.n_steps, scratch);
    launch("gemm_quantised", gemm_quantised_kernel<kBits, kOffset, kWide, kTiles>,
           {(deal.n_shares + kOwn - 1) / kOwn}, kThreads, n_slots * kStageBytes, stream, args,
           groups, deal, scratch, n, n_slots);
    launch("add_partials", add_partials_kernel,
           {deal.n_groups, (n + kFinishRows - 1) / kFinishRows}, kFinishWarps * kWarpSize, 0,
           stream, args, deal, scratch, first, n);
    return n;
  };
  for (int32_t first = 0; first < args.n;) {
    const int32_t left = args.n - first;
    int32_t taken = 0;
    if (left > 32) taken = pass(first, std::integral_constant<int, 8>());
    if (taken == 0 && left > 16) taken = pass(first, std::integral_constant<int, 4>());
    if (taken == 0) taken = pass(first, std::integral_constant<int, 2>());
    if (taken == 0) throw Error("gemm_quantised: a stage does not fit into shared memory");
    first += taken;
  }
}

template <int kBits, bool kWide>
void run(const LinearArgs& args, void* memory, Stream stream) {
  switch (args.parts[0].offset) {
    case Offset::kZeros:
      return run<kBits, Offset::kZeros, kWide>(args, memory, stream);
    case Offset::kMinimums:
      if constexpr (kWide) {
        throw Error("gemm_quantised: minimums are f16 or bf16");
      } else {
        return run<kBits, Offset::kMinimums, kWide>(args, memory, stream);
      }
    default:
      return run<kBits, Offset::kNone, kWide>(args, memory, stream);
  }
}

template <int kBits>
void run(const LinearArgs& args, void* memory, Stream stream) {
  if (args.parts[0].scale_dtype == DType::kF32) {
    run<kBits, true>(args, memory, stream);
  } else {
    run<kBits, false>(args, memory, stream);
  }
}

}  // namespace

bool gemm_quantised_takes(const LinearArgs& args) {
  if (args.cols % 4 != 0 || reinterpret_cast<uintptr_t>(args.x) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(args.norm) % 16 != 0) {
    return false;
  }
  const Deal deal = deal_of(args);
  const int64_t n_units = int64_t{deal.n_row_blocks} * deal.n_steps;
  return n_units * (deal.n_shares + 1) <= 0xffffffff;  // 32-bit arithmetic
}

int64_t gemm_quantised_scratch_bytes(const LinearArgs& args) {
  const ScratchBytes parts(deal_of(args), args.n);
  return parts.x + parts.squares + parts.partials;
}

void gemm_quantised(const LinearArgs& args, void* scratch, Stream stream) {
  for (int i = 1; i < args.n_parts; i++) {
    if (!args.parts[i].like(args.parts[0])) {
      throw Error("gemm_quantised: the matrices of one launch are not alike");
    }
  }
  if (args.parts[0].dtype == DType::kInt4) {
    run<4>(args, scratch, stream);
  } else {
    run<8>(args, scratch, stream);
  }
}

}  // namespace mustafar::cuda
