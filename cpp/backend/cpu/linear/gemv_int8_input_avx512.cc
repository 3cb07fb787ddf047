// Products of a quantised matrix with int8 activations, with AVX512_VNNI: four products a lane and
// instruction, lanes are the sixteen rows of a tile. A line of codes is loaded once and multiplied
// with the activations of up to kInputBlock rows, which are broadcast from the L1 cache; the loop
// waits for memory alone.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "backend/cpu/kernels.h"

namespace mustafar {
namespace {

// How far ahead of the loads codes are asked for, into the L2 cache: tiles lie one after another.
constexpr int64_t kAheadBytes = 4096;

inline __m512 load_scales(const Matrix& w, int64_t at) {
  const uint16_t* halves = static_cast<const uint16_t*>(w.scales) + at;
  switch (w.scale_dtype) {
    case DType::kF32:
      return _mm512_loadu_ps(static_cast<const float*>(w.scales) + at);
    case DType::kF16:
      return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
    default: {
      const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves));
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
    }
  }
}

inline __m512i four_inputs(const int8_t* codes) {
  int32_t word;
  std::memcpy(&word, codes, sizeof word);
  return _mm512_set1_epi32(word);
}

template <bool k4Bits, bool kZeros, int kBatch>
void tile(const QuantisedGemvArgs& args, int64_t row, int32_t batch0) {
  constexpr int kLines = k4Bits ? 4 : 8;   // of kInnerStep inputs
  constexpr int kMiddle = k4Bits ? 3 : 7;  // log2
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
    __m512 zeros = _mm512_setzero_ps();
    if constexpr (kZeros) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.zeros + at));
      zeros = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
    }
    __m512 parts[kBatch];
#pragma GCC unroll 8
    for (int b = 0; b < kBatch; b++) parts[b] = _mm512_setzero_ps();
    for (; step < end; step++) {
      __m512i products[kBatch];
#pragma GCC unroll 8
      for (int b = 0; b < kBatch; b++) products[b] = _mm512_setzero_si512();
#pragma GCC unroll 8
      for (int l = 0; l < kLines; l++, line += kLineBytes) {
        _mm_prefetch(reinterpret_cast<const char*>(line) + kAheadBytes, _MM_HINT_T1);
        const __m512i codes = _mm512_loadu_si512(line);
        if constexpr (k4Bits) {
          const __m512i low = _mm512_and_si512(codes, low_half);
          const __m512i high = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low_half);
#pragma GCC unroll 8
          for (int b = 0; b < kBatch; b++, inputs += 4) {
            products[b] = _mm512_dpbusd_epi32(products[b], low, four_inputs(inputs));
            products[b] = _mm512_dpbusd_epi32(products[b], high, four_inputs(inputs + 4 * kBatch));
          }
          inputs += 4 * kBatch;
        } else {
#pragma GCC unroll 8
          for (int b = 0; b < kBatch; b++, inputs += 4) {
            products[b] = _mm512_dpbusd_epi32(products[b], codes, four_inputs(inputs));
          }
        }
      }
#pragma GCC unroll 8
      for (int b = 0; b < kBatch; b++) {
        // The codes' zero comes off as zero times the sum of the activations' codes: exact.
        const __m512i input_sum = _mm512_set1_epi32(x.sums[step * kBatch + b]);
        __m512 sum;
        if constexpr (kZeros) {
          sum = _mm512_fnmadd_ps(zeros, _mm512_cvtepi32_ps(input_sum),
                                 _mm512_cvtepi32_ps(products[b]));
        } else {
          sum = _mm512_cvtepi32_ps(
              _mm512_sub_epi32(products[b], _mm512_slli_epi32(input_sum, kMiddle)));
        }
        parts[b] = _mm512_fmadd_ps(sum, _mm512_set1_ps(x.scales[step * kBatch + b]), parts[b]);
      }
    }
    const __m512 scales = load_scales(w, at);
#pragma GCC unroll 8
    for (int b = 0; b < kBatch; b++) sums[b] = _mm512_fmadd_ps(parts[b], scales, sums[b]);
  }

  const int64_t left = args.row1 - row;
  const __mmask16 mask = static_cast<__mmask16>(left >= 16 ? 0xffff : (1u << left) - 1);
#pragma GCC unroll 8
  for (int b = 0; b < kBatch; b++) {
    __m512 sum = sums[b];
    if (args.bias != nullptr) {
      sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, args.bias + row));
    }
    float* y = args.y + (batch0 + b) * args.y_stride + (row - args.row0);
    if (args.add) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y), sum);
    _mm512_mask_storeu_ps(y, mask, sum);
  }
}

template <bool k4Bits, bool kZeros, int kBatch = kInputBlock>
void tile_of(const QuantisedGemvArgs& args, int64_t row, int32_t batch0) {
  if constexpr (kBatch > 1) {
    if (args.batch - batch0 < kBatch) return tile_of<k4Bits, kZeros, kBatch - 1>(args, row, batch0);
  }
  tile<k4Bits, kZeros, kBatch>(args, row, batch0);
}

template <bool k4Bits, bool kZeros>
void tiles(const QuantisedGemvArgs& args) {
  for (int64_t row = args.row0; row < args.row1; row += kTileRows) {
    for (int32_t b = 0; b < args.batch; b += kInputBlock) tile_of<k4Bits, kZeros>(args, row, b);
  }
}

}  // namespace

void gemv_int8_input_avx512(const QuantisedGemvArgs& args) {
  const bool zeros = args.weights->zeros != nullptr;
  if (args.weights->dtype == DType::kInt4) {
    zeros ? tiles<true, true>(args) : tiles<true, false>(args);
  } else {
    zeros ? tiles<false, true>(args) : tiles<false, false>(args);
  }
}

}  // namespace mustafar
