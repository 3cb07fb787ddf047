// Products of a quantised matrix with integer activations, with AVX512_VNNI: four products a lane
// and instruction, lanes are the sixteen rows of a tile. A line of codes is loaded once and
// multiplied with the activations of a block of rows, which are broadcast from the L1 cache; for
// few rows the loop waits for memory alone.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "backend/cpu/kernels.h"
#include "backend/cpu/linear/product_avx512.h"

namespace mustafar {
namespace {

// How far ahead of the loads codes are asked for, into the L2 cache: tiles lie one after another.
constexpr int64_t kAheadBytes = 4096;

inline __m512i four_inputs(const int8_t* codes) {
  int32_t word;
  std::memcpy(&word, codes, sizeof word);
  return _mm512_set1_epi32(word);
}

template <bool k4Bits, Offset kOffset, int kBatch>
void tile(const QuantisedGemvArgs& args, int64_t row, int32_t batch0) {
  constexpr int kLines = k4Bits ? 4 : 8;  // of kInnerStep inputs
  constexpr int kPlanes = input_planes(k4Bits ? DType::kInt4 : DType::kInt8);
  constexpr int kProducts = kBatch * kPlanes;
  const Matrix& w = *args.weights;
  const QuantisedShape shape = w.shape();
  const int64_t tile = row / kTileRows;
  const uint8_t* line = static_cast<const uint8_t*>(w.data) + tile * shape.tile_code_bytes();
  const Int8Input x = args.input.block(batch0, shape.inner());
  const int8_t* inputs = x.codes;
  const int64_t n_steps = shape.inner() / kInnerStep, group_steps = w.group / kInnerStep;
  const __m512i low_half = _mm512_set1_epi8(15);

  __m512 sums[kBatch];
#pragma GCC unroll 8
  for (int b = 0; b < kBatch; b++) sums[b] = _mm512_setzero_ps();
  int64_t at = tile * shape.tile_scales();
  for (int64_t step = 0; step < n_steps; at += kTileRows) {
    const int64_t end = n_steps - step < group_steps ? n_steps : step + group_steps;
    __m512 parts[kBatch];
    float input_sums[kBatch];
#pragma GCC unroll 8
    for (int b = 0; b < kBatch; b++) {
      parts[b] = _mm512_setzero_ps();
      input_sums[b] = 0.0f;
    }
    for (; step < end; step++) {
      __m512i products[kProducts];  // [kBatch][kPlanes]
#pragma GCC unroll 8
      for (int i = 0; i < kProducts; i++) products[i] = _mm512_setzero_si512();
#pragma GCC unroll 8
      for (int l = 0; l < kLines; l++, line += kLineBytes) {
        _mm_prefetch(reinterpret_cast<const char*>(line) + kAheadBytes, _MM_HINT_T1);
        const __m512i codes = _mm512_loadu_si512(line);
        if constexpr (k4Bits) {
          const __m512i low = _mm512_and_si512(codes, low_half);
          const __m512i high = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low_half);
#pragma GCC unroll 8
          for (int i = 0; i < kProducts; i++, inputs += 4) {
            products[i] = _mm512_dpbusd_epi32(products[i], low, four_inputs(inputs));
            products[i] =
                _mm512_dpbusd_epi32(products[i], high, four_inputs(inputs + 4 * kProducts));
          }
          inputs += 4 * kProducts;
        } else {
#pragma GCC unroll 8
          for (int i = 0; i < kProducts; i++, inputs += 4) {
            products[i] = _mm512_dpbusd_epi32(products[i], codes, four_inputs(inputs));
          }
        }
      }
#pragma GCC unroll 8
      for (int b = 0; b < kBatch; b++) {
        __m512i sum = products[b * kPlanes];
        if constexpr (kPlanes == 2) {
          sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 7), products[b * kPlanes + 1]);
        }
        const float scale = x.scales[step * kBatch + b];
        parts[b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(scale), parts[b]);
        input_sums[b] += scale * static_cast<float>(x.sums[step * kBatch + b]);
      }
    }
    const __m512 scales = load_floats(w, w.scales, at);
    const __m512 offsets = load_offsets<kOffset>(w, at);
#pragma GCC unroll 8
    for (int b = 0; b < kBatch; b++) {
      sums[b] = add_group<kOffset>(parts[b], scales, offsets, input_sums[b], sums[b]);
    }
  }

#pragma GCC unroll 8
  for (int b = 0; b < kBatch; b++) store_lanes(args, row, batch0 + b, sums[b]);
}

template <bool k4Bits, Offset kOffset, int kBatch>
void tile_of(const QuantisedGemvArgs& args, int64_t row, int32_t batch0) {
  if constexpr (kBatch > 1) {
    if (args.batch - batch0 < kBatch) {
      return tile_of<k4Bits, kOffset, kBatch - 1>(args, row, batch0);
    }
  }
  tile<k4Bits, kOffset, kBatch>(args, row, batch0);
}

template <bool k4Bits, Offset kOffset>
void tiles(const QuantisedGemvArgs& args) {
  constexpr int kBlock = Int8Input::rows(input_planes(k4Bits ? DType::kInt4 : DType::kInt8));
  for (int64_t row = args.row0; row < args.row1; row += kTileRows) {
    for (int32_t b = 0; b < args.batch; b += kBlock) {
      tile_of<k4Bits, kOffset, kBlock>(args, row, b);
    }
  }
}

template <bool k4Bits>
void tiles(const QuantisedGemvArgs& args) {
  switch (args.weights->offset) {
    case Offset::kNone:
      return tiles<k4Bits, Offset::kNone>(args);
    case Offset::kZeros:
      return tiles<k4Bits, Offset::kZeros>(args);
    case Offset::kMinimums:
      return tiles<k4Bits, Offset::kMinimums>(args);
  }
}

}  // namespace

void gemv_int8_input_avx512(const QuantisedGemvArgs& args) {
  args.weights->dtype == DType::kInt4 ? tiles<true>(args) : tiles<false>(args);
}

}  // namespace mustafar
