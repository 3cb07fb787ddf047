// Products of a matrix of 8-bit codes with the integer activations of many rows, on AMX's tile
// registers. A line of codes is a row of a tile as it lies in memory; a row of the other operand is
// one row of activations. A product covers the 32 inputs that share a scale of the activations:
// sums are the same integers as everywhere, and what follows is done in the same order, with lanes
// that are the tile's rows. Few rows of activations are left to AVX512_VNNI, and so are 4-bit
// codes, which would have to be unpacked through memory.
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "backend/cpu/kernels.h"
#include "backend/cpu/linear/product_avx512.h"
#include "backend/cpu/simd/amx.h"

namespace mustafar {
namespace {

constexpr int32_t kPlanes = input_planes(DType::kInt8);
constexpr int32_t kChunk = 16;     // rows of activations at a time
constexpr int32_t kFewRows = 8;    // up to which AVX512_VNNI is faster
constexpr int32_t kStepLines = 8;  // of codes, with four inputs each
constexpr int64_t kStepBytes = kStepLines * kLineBytes;
constexpr int64_t kInputTileBytes = kChunk * kInnerStep;

// How far ahead of the loads codes are asked for: tiles lie one after another.
constexpr int64_t kAheadBytes = 4096;

// Tiles 0 to 3 are sums, 4 and 5 activations, 6 and 7 codes.
struct alignas(64) Config {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, kInnerStep, kInnerStep, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, kChunk, kChunk, kStepLines, kStepLines};
};

int64_t n_steps(int64_t inner) { return inner / kInnerStep; }

// What tile_int8_input makes of a chunk's activations: codes [steps][planes][16 rows][32], then
// scales and scaled sums [steps][16] each, zeros for rows that there are not.
struct Chunk {
  int8_t* codes;
  float* scales;
  float* sums;

  Chunk(void* tiles, int32_t index, int64_t inner) {
    auto* at = static_cast<uint8_t*>(tiles) + index * bytes(inner);
    codes = reinterpret_cast<int8_t*>(at);
    scales = reinterpret_cast<float*>(at + n_steps(inner) * kPlanes * kInputTileBytes);
    sums = scales + n_steps(inner) * kChunk;
  }
  static int64_t bytes(int64_t inner) {
    return n_steps(inner) * (kPlanes * kInputTileBytes + 2 * kChunk * 4);
  }
};

// sums [planes][16 rows of activations][16 outputs] of one step. kTurn: which registers.
template <int kTurn>
void multiply_step(const int8_t* inputs, const uint8_t* codes, int32_t* sums) {
  constexpr int kFirst = kTurn * 2;
  constexpr int kCodes = 6 + kTurn;
  amx_zero<kFirst>();
  amx_load<kCodes>(codes, kLineBytes);
  amx_load<4>(inputs, kInnerStep);
  amx_dot_codes<kFirst, 4, kCodes>();
  amx_store<kFirst>(sums, kAmxRowBytes);
  amx_zero<kFirst + 1>();
  amx_load<5>(inputs + kInputTileBytes, kInnerStep);
  amx_dot_codes<kFirst + 1, 5, kCodes>();
  amx_store<kFirst + 1>(sums + kChunk * 16, kAmxRowBytes);
}

// One tile of outputs by a chunk of n rows of activations, from row batch0 on.
template <Offset kOffset>
void tile(const QuantisedGemvArgs& args, const Chunk& chunk, int64_t row, int32_t batch0,
          int32_t n) {
  const Matrix& w = *args.weights;
  const QuantisedShape shape = w.shape();
  const int64_t tile = row / kTileRows;
  const auto* codes = static_cast<const uint8_t*>(w.data) + tile * shape.tile_code_bytes();
  const int64_t steps = n_steps(shape.inner()), group_steps = w.group / kInnerStep;

  // A step's products are made while those of the step before it are taken further.
  alignas(64) int32_t products[2][2 * kChunk * 16];
  const auto multiply = [&](int64_t step) {
    if (step >= steps) return;
    const uint8_t* from = codes + step * kStepBytes;
    for (int64_t line = 0; line < kStepBytes; line += kLineBytes) {
      _mm_prefetch(reinterpret_cast<const char*>(from + line) + kAheadBytes, _MM_HINT_T1);
    }
    const int turn = static_cast<int>(step % 2);
    const int8_t* inputs = chunk.codes + step * kPlanes * kInputTileBytes;
    turn == 0 ? multiply_step<0>(inputs, from, products[0])
              : multiply_step<1>(inputs, from, products[1]);
  };

  __m512 sums[kChunk];
#pragma GCC unroll 16
  for (int b = 0; b < kChunk; b++) sums[b] = _mm512_setzero_ps();
  int64_t at = tile * shape.tile_scales();
  multiply(0);
  for (int64_t step = 0; step < steps; at += kTileRows) {
    const int64_t end = steps - step < group_steps ? steps : step + group_steps;
    __m512 parts[kChunk], input_sums = _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int b = 0; b < kChunk; b++) parts[b] = _mm512_setzero_ps();
    for (; step < end; step++) {
      multiply(step + 1);
      const int32_t* of_step = products[step % 2];
      const float* scales = chunk.scales + step * kChunk;
#pragma GCC unroll 16
      for (int b = 0; b < kChunk; b++) {
        const __m512i high = _mm512_load_si512(of_step + b * 16);
        const __m512i low = _mm512_load_si512(of_step + (kChunk + b) * 16);
        const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high, 7), low);
        parts[b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(scales[b]), parts[b]);
      }
      const __m512 of_inputs = _mm512_loadu_ps(chunk.sums + step * kChunk);
      input_sums = _mm512_add_ps(input_sums, _mm512_mul_ps(_mm512_loadu_ps(scales), of_inputs));
    }
    const __m512 scales = load_floats(w, w.scales, at);
    const __m512 offsets = load_offsets<kOffset>(w, at);
    alignas(64) float of_inputs[kChunk];
    _mm512_store_ps(of_inputs, input_sums);
#pragma GCC unroll 16
    for (int b = 0; b < kChunk; b++) {
      sums[b] = add_group<kOffset>(parts[b], scales, offsets, of_inputs[b], sums[b]);
    }
  }

  for (int b = 0; b < n; b++) store_lanes(args, row, batch0 + b, sums[b]);
}

template <Offset kOffset>
void tiles(const QuantisedGemvArgs& args, int32_t n_chunks) {
  const int64_t inner = args.weights->shape().inner();
  for (int64_t row = args.row0; row < args.row1; row += kTileRows) {
    for (int32_t i = 0; i < n_chunks; i++) {
      const Chunk chunk(const_cast<void*>(args.tiles), i, inner);
      tile<kOffset>(args, chunk, row, i * kChunk, std::min(kChunk, args.batch - i * kChunk));
    }
  }
}

void tiles(const QuantisedGemvArgs& args, int32_t n_chunks) {
  switch (args.weights->offset) {
    case Offset::kNone:
      return tiles<Offset::kNone>(args, n_chunks);
    case Offset::kZeros:
      return tiles<Offset::kZeros>(args, n_chunks);
    case Offset::kMinimums:
      return tiles<Offset::kMinimums>(args, n_chunks);
  }
}

// Chunks that AMX takes; what is left after them are few rows.
int32_t chunks_of(int32_t batch) { return batch / kChunk + (batch % kChunk > kFewRows ? 1 : 0); }

}  // namespace

int64_t int8_tiles_bytes_amx(int32_t batch, int64_t inner, int32_t planes) {
  return planes == kPlanes ? chunks_of(batch) * Chunk::bytes(inner) : 0;
}

void tile_int8_input_amx(const Int8Input& input, int32_t batch, int64_t inner, void* tiles) {
  for (int32_t i = 0; i < chunks_of(batch); i++) {
    const Chunk chunk(tiles, i, inner);
    if (batch - i * kChunk < kChunk) {
      std::memset(chunk.codes, 0, Chunk::bytes(inner));
    }
    for (int32_t b = 0; b < std::min(kChunk, batch - i * kChunk); b++) {
      const int32_t row = i * kChunk + b;
      const int32_t first = row / input.rows() * input.rows();
      const int32_t n = std::min(input.rows(), batch - first);
      const Int8Input block = input.block(first, inner);
      for (int64_t step = 0; step < n_steps(inner); step++) {
        chunk.scales[step * kChunk + b] = block.scales[step * n + row - first];
        chunk.sums[step * kChunk + b] = static_cast<float>(block.sums[step * n + row - first]);
        for (int32_t plane = 0; plane < kPlanes; plane++) {
          int8_t* out = chunk.codes + (step * kPlanes + plane) * kInputTileBytes + b * kInnerStep;
          for (int64_t quad = 0; quad < kInnerStep / 4; quad++) {
            const int64_t at = (step * (kInnerStep / 4) + quad) * n + (row - first);
            std::memcpy(out + quad * 4, block.codes + (at * kPlanes + plane) * 4, 4);
          }
        }
      }
    }
  }
}

void gemv_int8_input_amx(const QuantisedGemvArgs& args) {
  const bool has_tiles = args.tiles != nullptr && args.weights->dtype == DType::kInt8;
  const int32_t n_chunks = has_tiles ? chunks_of(args.batch) : 0;
  if (n_chunks > 0) {
    static constexpr Config kConfig;
    _tile_loadconfig(&kConfig);
    tiles(args, n_chunks);
    release_amx();
  }
  const int32_t done = std::min(args.batch, n_chunks * kChunk);
  if (done == args.batch) return;
  QuantisedGemvArgs rest = args;
  rest.batch -= done;
  rest.y += done * args.y_stride;
  rest.input = args.input.block(done, args.weights->shape().inner());
  gemv_int8_input_avx512(rest);
}

}  // namespace mustafar
