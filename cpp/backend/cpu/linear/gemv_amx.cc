// Products of bf16 weights with a few f32 activation rows on AMX's tile registers. Sixteen rows of
// weights by 32 columns are a tile as they lie in memory; the bf16 terms of the activations
// (bf16_terms.h) are the columns of the other operand. One row of activations waits for memory, and
// sixteen cost little more than one: a tile has room for the terms of five.
//
// A result is the sum of three, one a term, each taken in the order of the columns: it depends on
// neither the batch nor the split into tasks.
//
// The templates are over Simd, so the order of these includes matters.
// clang-format off
#include "backend/cpu/kernels.h"
#include "backend/cpu/simd/avx512.h"
#include "backend/cpu/simd/amx.h"
#include "backend/cpu/linear/bf16_terms.h"
#include "backend/cpu/linear/product_avx512.h"
// clang-format on

#include <algorithm>
#include <cstring>

namespace mustafar {
namespace {

constexpr int32_t kBlockRows = 16;      // of weights that are multiplied at a time: a tile
constexpr int32_t kChunk = 16;          // activation rows that are multiplied at a time
constexpr int32_t kMostTiles = kTerms;  // of a chunk's terms
constexpr int64_t kSumStride = kMostTiles * kAmxWords + kAmxWords;  // off each other's cache sets

constexpr int32_t term_tiles(int32_t rows) { return (kTerms * rows + kAmxWords - 1) / kAmxWords; }

// The terms of a chunk of n rows: [column steps][tiles of terms][16 pairs of columns][16], where
// word t * n + b of a step's rows is term t of row b.
int64_t chunk_bytes(int32_t n, int64_t cols) {
  return column_steps(cols) * term_tiles(n) * kAmxTileBytes;
}

// Weights of this many columns of a block's rows are asked for before they are multiplied: reading
// tiles walks across the rows, which the processor does not foresee.
constexpr int64_t kAheadColumns = 256;

// A block of rows of weights, and what it is multiplied with.
struct Block {
  const uint16_t* weights;  // [n_rows][cols]
  int64_t cols;
  int64_t n_rows;        // kBlockRows, or fewer at the end of a task
  bool last;             // of its task: another thread may have the rows that come after it
  const uint8_t* terms;  // of a chunk
};

// The tile of one column step of a block, zeros where there are no weights.
struct alignas(64) Staged {
  uint16_t rows[kBlockRows][kPairColumns];

  Staged(const Block& block, int64_t col) {
    std::memset(rows, 0, sizeof(rows));
    const int64_t n = std::min<int64_t>(kPairColumns, block.cols - col);
    for (int64_t r = 0; r < block.n_rows; r++) {
      std::memcpy(rows[r], block.weights + r * block.cols + col, n * sizeof(uint16_t));
    }
  }
};

inline void ask_for(const uint16_t* line) {
  _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T0);
}

// The first columns of a task.
void ask_for_first(const uint16_t* weights, int64_t cols) {
  for (int64_t r = 0; r < kBlockRows; r++) {
    for (int64_t c = 0; c < std::min(kAheadColumns, cols); c += kPairColumns) {
      ask_for(weights + r * cols + c);
    }
  }
}

// Adds one column step. Operands of a step are loaded while those of the step before it are
// multiplied: where there is room, odd steps have registers of their own.
template <int kTermTiles, bool kOdd>
inline void add_step(const void* weights, int64_t stride_bytes, const uint8_t* terms) {
  constexpr int kWeights = kTermTiles + kOdd;
  constexpr int kFirst = kTermTiles + 2 + (kTermTiles < 3 && kOdd ? kTermTiles : 0);
  amx_load<kWeights>(weights, stride_bytes);
  amx_load<kFirst>(terms, kAmxRowBytes);
  amx_dot_bf16<0, kWeights, kFirst>();
  if constexpr (kTermTiles > 1) {
    amx_load<kFirst + 1>(terms + kAmxTileBytes, kAmxRowBytes);
    amx_dot_bf16<1, kWeights, kFirst + 1>();
  }
  if constexpr (kTermTiles > 2) {
    amx_load<kFirst + 2>(terms + 2 * kAmxTileBytes, kAmxRowBytes);
    amx_dot_bf16<2, kWeights, kFirst + 2>();
  }
}

// sums [16][kSumStride], its first words: the products with the chunk's terms.
template <int kTermTiles>
void multiply(const Block& block, float* sums) {
  amx_zero<0>();
  if constexpr (kTermTiles > 1) amx_zero<1>();
  if constexpr (kTermTiles > 2) amx_zero<2>();
  const int64_t stride = block.cols * static_cast<int64_t>(sizeof(uint16_t));
  const uint8_t* terms = block.terms;
  const int64_t whole = block.n_rows == kBlockRows ? block.cols / kPairColumns * kPairColumns : 0;
  const auto step = [&]<bool kOdd>(int64_t c) {
    const bool turn = c + kAheadColumns >= block.cols;
    if (!turn || !block.last) {
      const uint16_t* ahead =
          block.weights + c + kAheadColumns + (turn ? (kBlockRows - 1) * block.cols : 0);
#pragma GCC unroll 16
      for (int r = 0; r < kBlockRows; r++) ask_for(ahead + r * block.cols);
    }
    add_step<kTermTiles, kOdd>(block.weights + c, stride, terms);
    terms += kTermTiles * kAmxTileBytes;
  };
  int64_t c = 0;
  for (; c + 2 * kPairColumns <= whole; c += 2 * kPairColumns) {
    step.template operator()<false>(c);
    step.template operator()<true>(c + kPairColumns);
  }
  if (c < whole) step.template operator()<false>(c);
  for (c = whole; c < block.cols; c += kPairColumns) {
    const Staged staged(block, c);
    add_step<kTermTiles, true>(staged.rows, sizeof(staged.rows[0]), terms);
    terms += kTermTiles * kAmxTileBytes;
  }

  constexpr int64_t kBytes = kSumStride * sizeof(float);
  amx_store<0>(sums, kBytes);
  if constexpr (kTermTiles > 1) amx_store<1>(sums + kAmxWords, kBytes);
  if constexpr (kTermTiles > 2) amx_store<2>(sums + 2 * kAmxWords, kBytes);
}

void multiply(const Block& block, int32_t tiles, float* sums) {
  switch (tiles) {
    case 1:
      return multiply<1>(block, sums);
    case 2:
      return multiply<2>(block, sums);
    default:
      return multiply<3>(block, sums);
  }
}

// What a block's sums are for: n activation rows from batch0 on, sixteen outputs from row on.
struct Results {
  int64_t row = 0;
  int32_t batch0 = 0;
  int32_t n = 0;
};

// Adds the sums [16][kSumStride] of the terms up.
void store(const GemvArgs& args, const float* sums, const Results& results) {
  const int32_t n = results.n;
  const bool one_tile = term_tiles(n) == 1;
  Simd::F by_row[kBlockRows];
  if (one_tile) {  // lanes are terms of activations
#pragma GCC unroll 16
    for (int r = 0; r < kBlockRows; r++) by_row[r] = Simd::load(sums + r * kSumStride);
  } else {  // lanes are activations
    const __mmask16 lanes = first_mask(n);
#pragma GCC unroll 16
    for (int r = 0; r < kBlockRows; r++) {
      const float* terms = sums + r * kSumStride;
      const Simd::F rest = Simd::add(_mm512_maskz_loadu_ps(lanes, terms + 2 * n),
                                     _mm512_maskz_loadu_ps(lanes, terms + n));
      by_row[r] = Simd::add(rest, _mm512_maskz_loadu_ps(lanes, terms));
    }
  }
  Simd::transpose(by_row);
  for (int32_t b = 0; b < n; b++) {
    Simd::F sum = by_row[b];
    if (one_tile) sum = Simd::add(Simd::add(by_row[2 * n + b], by_row[n + b]), sum);
    store_lanes(args, results.row, results.batch0 + b, sum);
  }
}

}  // namespace

int64_t gemv_terms_bytes_amx(int32_t batch, int64_t cols) {
  const int32_t chunks = batch / kChunk, rest = batch % kChunk;
  return chunks * chunk_bytes(kChunk, cols) + (rest > 0 ? chunk_bytes(rest, cols) : 0);
}

void gemv_split_terms_amx(const float* x, int64_t x_stride, int32_t batch, int64_t cols,
                          void* terms) {
  auto* out = static_cast<uint8_t*>(terms);
  for (int32_t b0 = 0; b0 < batch; b0 += kChunk) {
    const int32_t n = std::min(kChunk, batch - b0);
    const int32_t tiles = term_tiles(n);
    for (int64_t c = 0; c < cols; c += kPairColumns) {
      Simd::F columns[kMostTiles * kAmxWords];
      for (int32_t i = kTerms * n; i < tiles * kAmxWords; i++) columns[i] = Simd::zero();
      for (int32_t b = 0; b < n; b++) {
        __m512i of_row[kTerms];
        split_terms(x + (b0 + b) * x_stride + c, cols - c, of_row);
        for (int t = 0; t < kTerms; t++) columns[t * n + b] = _mm512_castsi512_ps(of_row[t]);
      }
      for (int32_t tile = 0; tile < tiles; tile++, out += kAmxTileBytes) {
        Simd::F* rows = columns + tile * kAmxWords;
        Simd::transpose(rows);
        for (int r = 0; r < kAmxWords; r++) {
          Simd::store(reinterpret_cast<float*>(out) + r * kAmxWords, rows[r]);
        }
      }
    }
  }
}

void gemv_bf16_amx(const GemvArgs& args) {
  alignas(64) float sums[2][kBlockRows * kSumStride];
  const auto* weights = static_cast<const uint16_t*>(args.weights) + args.row0 * args.cols;
  if (args.row1 - args.row0 >= kBlockRows) ask_for_first(weights, args.cols);
  // A block's sums are read while the next one's are made: they take a while to get to memory.
  Results made;
  int turn = 0;
  configure_amx();
  for (int64_t row = args.row0; row < args.row1; row += kBlockRows) {
    const int64_t left = args.row1 - row;
    const auto* terms = static_cast<const uint8_t*>(args.terms);
    for (int32_t b = 0; b < args.batch; b += kChunk) {
      const int32_t n = std::min(kChunk, args.batch - b);
      const int64_t n_rows = std::min<int64_t>(kBlockRows, left);
      multiply({weights, args.cols, n_rows, left < 2 * kBlockRows, terms}, term_tiles(n),
               sums[turn]);
      turn = 1 - turn;
      store(args, sums[turn], made);
      made = {row, b, n};
      terms += chunk_bytes(n, args.cols);
    }
    weights += kBlockRows * args.cols;
  }
  release_amx();
  store(args, sums[1 - turn], made);
}

}  // namespace mustafar
