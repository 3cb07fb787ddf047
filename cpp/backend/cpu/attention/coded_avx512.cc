// Coded rows for AVX-512: packing sixteen dims at a time with all scales side by side, unpacking to
// floats.
#include "backend/cpu/attention/coded_avx512.h"

#include <immintrin.h>

#include "backend/cpu/attention/coded_kernels.h"

// GCC 12's own headers hand uninitialised vectors to builtins that ignore them.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace mustafar {
namespace {

inline float inverse_of(float x) { return x >= kLeastScale ? 1.0f / x : 0.0f; }

// The sum of 16 lanes in the order of format/coded.cc: the upper half to the lower, again and
// again.
inline float total(__m512 x) {
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

inline __m512 load_row(DType tail, const uint8_t* row, int32_t d) {
  if (tail == DType::kF32) return _mm512_loadu_ps(reinterpret_cast<const float*>(row) + d);
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 2 * d));
  if (tail == DType::kF16) return _mm512_cvtph_ps(x);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

// Codes of 16 dims as floats; their integer part counts. u: x times the steps' inverses.
inline __m512 codes_of(__m512 u, __m512 inverse, __m512 half, __m512 top) {
  const __m512 code = _mm512_add_ps(_mm512_mul_ps(u, inverse), half);
  return _mm512_min_ps(_mm512_max_ps(code, _mm512_setzero_ps()), top);
}

// See choose_scale of format/coded.cc.
uint16_t choose_scale(const CodeRow& row, const float* x, int32_t n) {
  __m512 squares = _mm512_setzero_ps();
  for (int32_t d = 0; d < n; d += 16) {
    const __m512 u = _mm512_mul_ps(_mm512_load_ps(x + d), _mm512_loadu_ps(&row.inverse_sigma[d]));
    squares = _mm512_add_ps(squares, _mm512_mul_ps(u, u));
  }
  const __m128 mean = _mm_set_ss(total(squares) / static_cast<float>(n));
  const float rms = _mm_cvtss_f32(_mm_sqrt_ss(mean));
  uint16_t best = f32_to_bf16(rms);
  if (!(bf16_to_f32(best) < __builtin_inff())) return best;

  uint16_t bits[kScaleChoices];
  const float inverse_rms = inverse_of(rms);
  __m512 ratio[kScaleChoices], inverse[kScaleChoices], error[kScaleChoices];
#pragma GCC unroll 8
  for (int j = 0; j < kScaleChoices; j++) {
    bits[j] = f32_to_bf16(rms * kScaleFactors[j]);
    ratio[j] = _mm512_set1_ps(bf16_to_f32(bits[j]) * inverse_rms);
    inverse[j] = _mm512_set1_ps(inverse_of(bf16_to_f32(bits[j])));
    error[j] = _mm512_setzero_ps();
  }
  for (int32_t d = 0; d < n; d += 16) {
    const __m512 value = _mm512_load_ps(x + d);
    const __m512 u = _mm512_mul_ps(value, _mm512_loadu_ps(&row.inverse_step[d]));
    const __m512 half = _mm512_loadu_ps(&row.half[d]), top = _mm512_loadu_ps(&row.top[d]);
    const __m512 step = _mm512_loadu_ps(&row.step[d]);
    const __m512 unit = _mm512_mul_ps(value, _mm512_set1_ps(inverse_rms));
    const __m512 middle = _mm512_sub_ps(half, _mm512_set1_ps(0.5f));
#pragma GCC unroll 8
    for (int j = 0; j < kScaleChoices; j++) {
      const __m512 code = _mm512_roundscale_ps(codes_of(u, inverse[j], half, top),
                                               _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
      const __m512 level = _mm512_mul_ps(_mm512_sub_ps(code, middle), step);
      const __m512 e = _mm512_sub_ps(unit, _mm512_mul_ps(level, ratio[j]));
      const __m512 square = _mm512_mul_ps(e, e);
      error[j] = _mm512_add_ps(error[j], _mm512_mul_ps(square, square));
    }
  }
  float least = __builtin_inff();
#pragma GCC unroll 8
  for (int j = 0; j < kScaleChoices; j++) {
    const float sum = total(error[j]);
    if (sum < least) {
      least = sum;
      best = bits[j];
    }
  }
  return best;
}

// A byte for each of eight codes, with as many low bits set as the code is wide.
inline uint64_t octet_mask(const uint8_t* widths) {
  uint64_t mask = 0;
  for (int i = 0; i < 8; i++) mask |= uint64_t{(1u << widths[i]) - 1} << 8 * i;
  return mask;
}

}  // namespace

int32_t pack_coded_rows_avx512(const SlotLayout& layout, const uint8_t* widths, const CodeRow& row,
                               DType tail, const uint8_t* const* rows, uint8_t* slot) {
  const int32_t n = layout.head_dim;
  uint64_t masks[kMaxCodedDims / 8];
  for (int32_t o = 0; o < n / 8; o++) masks[o] = octet_mask(widths + 8 * o);
  __builtin_memset(slot, 0, layout.slot_bytes);
  for (int32_t t = 0; t < kBlockTokens; t++) {
    alignas(64) float x[kMaxCodedDims];
    alignas(64) uint8_t codes[kMaxCodedDims];
    for (int32_t d = 0; d < n; d += 16) _mm512_store_ps(x + d, load_row(tail, rows[t], d));
    const uint16_t scale_bits = choose_scale(row, x, n);
    const float scale = bf16_to_f32(scale_bits);
    if (!(scale < __builtin_inff())) return t;
    __builtin_memcpy(slot + layout.scales_offset + t * 2, &scale_bits, 2);
    const __m512 inverse = _mm512_set1_ps(inverse_of(scale));
    for (int32_t d = 0; d < n; d += 16) {
      const __m512 u = _mm512_mul_ps(_mm512_load_ps(x + d), _mm512_loadu_ps(&row.inverse_step[d]));
      const __m512 code =
          codes_of(u, inverse, _mm512_loadu_ps(&row.half[d]), _mm512_loadu_ps(&row.top[d]));
      _mm_store_si128(reinterpret_cast<__m128i*>(codes + d),
                      _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(code)));
    }
    // Eight codes are at most 56 bits, after at most seven that are left over.
    uint8_t* out = slot + layout.values_offset + t * layout.row_bytes;
    uint8_t* const end = out + layout.row_bytes;
    uint64_t pending = 0;
    int32_t n_bits = 0;
    for (int32_t o = 0; o < n / 8; o++) {
      uint64_t octet;
      __builtin_memcpy(&octet, codes + 8 * o, 8);
      pending |= _pext_u64(octet, masks[o]) << n_bits;
      n_bits += __builtin_popcountll(masks[o]);
      const int32_t whole = n_bits / 8;
      __builtin_memcpy(out, &pending, end - out < 8 ? end - out : 8);
      out += whole;
      pending >>= 8 * whole;
      n_bits -= 8 * whole;
    }
  }
  return -1;
}

void unpack_coded_slot_avx512(const SlotLayout& layout, const CodeTable& table, const uint8_t* slot,
                              float* out) {
  const int32_t n = layout.head_dim;
  if (n % 64 != 0 || n > kMaxCodedDims) return unpack_coded_slot(layout, table, slot, out);
  alignas(64) float steps[kMaxCodedDims];
  for (int32_t d = 0; d < n; d++) steps[d] = coded_step(table.widths[d]) * table.sigmas[d];
  for (int32_t c = 0; c < n / 64; c++) {
    CodeChunk chunk;
    make_chunk(table.widths, c, chunk);
    for (int32_t t = 0; t < kBlockTokens; t++) {
      uint16_t bits;
      __builtin_memcpy(&bits, slot + layout.scales_offset + t * 2, 2);
      const __m512 scale = _mm512_set1_ps(bf16_to_f32(bits));
      const __m512i codes =
          unpack_codes<false>(chunk, slot + layout.values_offset + t * layout.row_bytes);
      const __m128i parts[4] = {_mm512_castsi512_si128(codes), _mm512_extracti32x4_epi32(codes, 1),
                                _mm512_extracti32x4_epi32(codes, 2),
                                _mm512_extracti32x4_epi32(codes, 3)};
      for (int i = 0; i < 4; i++) {
        const int32_t d = 64 * c + 16 * i;
        const __m512 level =
            _mm512_add_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(parts[i])), _mm512_set1_ps(0.5f));
        const __m512 value = _mm512_mul_ps(_mm512_mul_ps(level, _mm512_load_ps(steps + d)), scale);
        // Dims without bits are +0 whatever the scale.
        const __mmask16 coded = _mm_test_epi8_mask(
            _mm_load_si128(reinterpret_cast<const __m128i*>(chunk.masks + 16 * i)),
            _mm_set1_epi8(-1));
        _mm512_storeu_ps(out + int64_t{t} * n + d, _mm512_maskz_mov_ps(coded, value));
      }
    }
  }
}

}  // namespace mustafar
