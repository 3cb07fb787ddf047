// Products of a quantised matrix with integer activations in AVX2: pairs of products in 16 bits,
// then pairs of those in 32. 8-bit codes are taken as signed and multiplied as |code| and the
// activation with the code's sign, so that no pair overflows; those of 4 bits stay unsigned, and a
// whole step of them fits 16 bits.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "backend/cpu/kernels.h"

namespace mustafar {
namespace {

constexpr int kHalves = 2;  // of a tile's rows: eight lanes each
constexpr int64_t kAheadBytes = 4096;

inline __m256 load_floats(const Matrix& w, const void* values, int64_t at) {
  const uint16_t* halves = static_cast<const uint16_t*>(values) + at;
  switch (w.scale_dtype) {
    case DType::kF32:
      return _mm256_loadu_ps(static_cast<const float*>(values) + at);
    case DType::kF16:
      return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
    default: {
      const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves));
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
    }
  }
}

// The zeros of eight rows or, of a matrix that has those, their minimums.
inline __m256 load_offsets(const Matrix& w, int64_t at) {
  switch (w.offset) {
    case Offset::kMinimums:
      return load_floats(w, w.offsets, at);
    case Offset::kZeros: {
      const uint8_t* zeros = static_cast<const uint8_t*>(w.offsets) + at;
      return _mm256_cvtepi32_ps(
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros))));
    }
    default:
      return _mm256_set1_ps(static_cast<float>(middle_code(w.dtype)));
  }
}

inline __m256i four_inputs(const int8_t* codes) {
  int32_t word;
  std::memcpy(&word, codes, sizeof word);
  return _mm256_set1_epi32(word);
}

inline __m256i load(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// Sums of codes (8 bits: less 128) times inputs over one step, of eight rows. inputs: of kCount
// rows or planes side by side.
template <bool k4Bits, int kCount>
inline void multiply_step(const uint8_t* line, const int8_t* inputs, __m256i* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int i = 0; i < kCount; i++) sums[i] = _mm256_setzero_si256();
  if constexpr (k4Bits) {
    const __m256i low_half = _mm256_set1_epi8(15);
    for (int l = 0; l < 4; l++, inputs += 8 * kCount) {
      const __m256i codes = load(line + l * kLineBytes);
      const __m256i low = _mm256_and_si256(codes, low_half);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(codes, 4), low_half);
      for (int i = 0; i < kCount; i++) {
        const __m256i first = _mm256_maddubs_epi16(low, four_inputs(inputs + 4 * i));
        const __m256i second = _mm256_maddubs_epi16(high, four_inputs(inputs + 4 * (kCount + i)));
        sums[i] = _mm256_add_epi16(sums[i], _mm256_add_epi16(first, second));
      }
    }
    for (int i = 0; i < kCount; i++) sums[i] = _mm256_madd_epi16(sums[i], ones);
  } else {
    const __m256i top = _mm256_set1_epi8(-128);
    for (int l = 0; l < 8; l++, inputs += 4 * kCount) {
      const __m256i codes = _mm256_xor_si256(load(line + l * kLineBytes), top);
      const __m256i size = _mm256_abs_epi8(codes);
      for (int i = 0; i < kCount; i++) {
        const __m256i x = _mm256_sign_epi8(four_inputs(inputs + 4 * i), codes);
        sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(_mm256_maddubs_epi16(size, x), ones));
      }
    }
  }
}

template <bool k4Bits, int kBatch>
void tile(const QuantisedGemvArgs& args, int64_t row, int32_t batch0) {
  constexpr int64_t kStepBytes = kTileRows * kInnerStep / (k4Bits ? 2 : 1);
  constexpr int kPlanes = input_planes(k4Bits ? DType::kInt4 : DType::kInt8);
  constexpr int kTakenOff = k4Bits ? 0 : 128;  // by multiply_step
  const Matrix& w = *args.weights;
  const QuantisedShape shape = w.shape();
  const int64_t tile = row / kTileRows;
  const uint8_t* line = static_cast<const uint8_t*>(w.data) + tile * shape.tile_code_bytes();
  const Int8Input x = args.input.block(batch0, shape.inner());
  const int64_t n_steps = shape.inner() / kInnerStep, group_steps = w.group / kInnerStep;

  __m256 sums[kHalves][kBatch];
  for (auto& half : sums) {
    for (__m256& sum : half) sum = _mm256_setzero_ps();
  }
  int64_t at = tile * shape.tile_scales();
  for (int64_t step = 0; step < n_steps; at += kTileRows) {
    const int64_t end = n_steps - step < group_steps ? n_steps : step + group_steps;
    __m256 parts[kHalves][kBatch];
    for (auto& half : parts) {
      for (__m256& part : half) part = _mm256_setzero_ps();
    }
    float input_sums[kBatch] = {};
    for (; step < end; step++, line += kStepBytes) {
      for (int64_t i = 0; i < kStepBytes; i += kLineBytes) {
        _mm_prefetch(reinterpret_cast<const char*>(line) + kAheadBytes + i, _MM_HINT_T1);
      }
      const float* scales = x.scales + step * kBatch;
      const int32_t* v_sums = x.sums + step * kBatch;
      for (int h = 0; h < kHalves; h++) {
        __m256i products[kBatch * kPlanes];
        multiply_step<k4Bits, kBatch * kPlanes>(
            line + h * 32, x.codes + step * kInnerStep * kBatch * kPlanes, products);
        for (int b = 0; b < kBatch; b++) {
          __m256i sum = products[b * kPlanes];
          if constexpr (kPlanes == 2) {
            sum = _mm256_add_epi32(_mm256_slli_epi32(sum, 7), products[b * kPlanes + 1]);
          }
          sum = _mm256_add_epi32(sum, _mm256_set1_epi32(kTakenOff * v_sums[b]));
          parts[h][b] =
              _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(scales[b]), parts[h][b]);
        }
      }
      for (int b = 0; b < kBatch; b++) input_sums[b] += scales[b] * static_cast<float>(v_sums[b]);
    }
    for (int h = 0; h < kHalves; h++) {
      const __m256 scales = load_floats(w, w.scales, at + h * 8);
      const __m256 offsets = load_offsets(w, at + h * 8);
      for (int b = 0; b < kBatch; b++) {
        const __m256 input_sum = _mm256_set1_ps(input_sums[b]);
        __m256& sum = sums[h][b];
        if (w.offset == Offset::kMinimums) {
          sum = _mm256_fmadd_ps(parts[h][b], scales, sum);
          sum = _mm256_fmadd_ps(offsets, input_sum, sum);
        } else {
          sum = _mm256_fmadd_ps(_mm256_fnmadd_ps(offsets, input_sum, parts[h][b]), scales, sum);
        }
      }
    }
  }
  for (int b = 0; b < kBatch; b++) {
    float lanes[kTileRows];
    for (int h = 0; h < kHalves; h++) _mm256_storeu_ps(lanes + h * 8, sums[h][b]);
    for (int r = 0; r < kTileRows; r++) args.store(row + r, batch0 + b, lanes[r]);
  }
}

template <bool k4Bits, int kBatch>
void tile_of(const QuantisedGemvArgs& args, int64_t row, int32_t batch0) {
  if constexpr (kBatch > 1) {
    if (args.batch - batch0 < kBatch) return tile_of<k4Bits, kBatch - 1>(args, row, batch0);
  }
  tile<k4Bits, kBatch>(args, row, batch0);
}

template <bool k4Bits>
void tiles(const QuantisedGemvArgs& args) {
  constexpr int kBlock = Int8Input::rows(input_planes(k4Bits ? DType::kInt4 : DType::kInt8));
  for (int64_t row = args.row0; row < args.row1; row += kTileRows) {
    for (int32_t b = 0; b < args.batch; b += kBlock) tile_of<k4Bits, kBlock>(args, row, b);
  }
}

}  // namespace

void gemv_int8_input_avx2(const QuantisedGemvArgs& args) {
  args.weights->dtype == DType::kInt4 ? tiles<true>(args) : tiles<false>(args);
}

}  // namespace mustafar
