// Expands slots with AVX-512 (VBMI2): a mask word and its kept values become 32 floats.
#include <immintrin.h>

#include <cstring>

#include "backend/cpu/attention/unpack.h"
#include "format/pack.h"

// GCC 12's own headers hand uninitialised vectors to builtins that ignore them.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace mustafar {
namespace {

inline uint64_t first_lanes(uint32_t n) { return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

// 32 floats from the values from index `next` of a row on, one per bit of mask. The intrinsics'
// forms that load under a mask touch nothing but the lanes they need.
template <DType kType>
inline void expand(const uint8_t* values, uint32_t next, uint32_t mask, __m512 scale, float* out) {
  const uint32_t count = static_cast<uint32_t>(__builtin_popcount(mask));
  __m512 low, high;
  if constexpr (kType == DType::kF32) {
    const float* p = reinterpret_cast<const float*>(values) + next;
    const uint32_t in_low = static_cast<uint32_t>(__builtin_popcount(mask & 0xffff));
    const __mmask16 load_low = static_cast<__mmask16>(first_lanes(in_low));
    const __mmask16 load_high = static_cast<__mmask16>(first_lanes(count - in_low));
    low = _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), _mm512_maskz_loadu_ps(load_low, p));
    high = _mm512_maskz_expand_ps(static_cast<__mmask16>(mask >> 16),
                                  _mm512_maskz_loadu_ps(load_high, p + in_low));
  } else if constexpr (kType == DType::kF16 || kType == DType::kBF16) {
    const __m512i packed =
        _mm512_maskz_loadu_epi16(static_cast<__mmask32>(first_lanes(count)), values + next * 2);
    const __m512i x = _mm512_maskz_expand_epi16(mask, packed);
    const __m256i a = _mm512_castsi512_si256(x), b = _mm512_extracti64x4_epi64(x, 1);
    if constexpr (kType == DType::kF16) {
      low = _mm512_cvtph_ps(a);
      high = _mm512_cvtph_ps(b);
    } else {
      low = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16));
      high = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
    }
  } else {
    __m256i packed;
    if constexpr (kType == DType::kInt8) {
      packed = _mm256_maskz_loadu_epi8(static_cast<__mmask32>(first_lanes(count)), values + next);
    } else {  // two to a byte: next is even but where the group keeps an odd number
      const __mmask32 load = static_cast<__mmask32>(first_lanes((next % 2 + count + 1) / 2));
      const __m256i bytes = _mm256_maskz_loadu_epi8(load, values + next / 2);
      const __m512i words = _mm512_cvtepu8_epi16(bytes);
      // The low nibble to the low byte, the high one to the high byte.
      const __m512i spread = _mm512_and_si512(_mm512_or_si512(words, _mm512_slli_epi16(words, 4)),
                                              _mm512_set1_epi16(0x0f0f));
      const __m512i eight = _mm512_set1_epi8(8);
      const __m512i codes = _mm512_sub_epi8(_mm512_xor_si512(spread, eight), eight);
      const __m512i from = _mm512_add_epi8(
          _mm512_set1_epi8(static_cast<char>(next % 2)),
          _mm512_set_epi8(63, 62, 61, 60, 59, 58, 57, 56, 55, 54, 53, 52, 51, 50, 49, 48, 47, 46,
                          45, 44, 43, 42, 41, 40, 39, 38, 37, 36, 35, 34, 33, 32, 31, 30, 29, 28,
                          27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9,
                          8, 7, 6, 5, 4, 3, 2, 1, 0));
      packed = _mm512_castsi512_si256(_mm512_permutexvar_epi8(from, codes));
    }
    const __m256i x = _mm256_maskz_expand_epi8(mask, packed);
    const __m512i a = _mm512_cvtepi8_epi32(_mm256_castsi256_si128(x));
    const __m512i b = _mm512_cvtepi8_epi32(_mm256_extracti128_si256(x, 1));
    // Pruned lanes are +0 whatever the scale.
    low = _mm512_maskz_mul_ps(static_cast<__mmask16>(mask), _mm512_cvtepi32_ps(a), scale);
    high = _mm512_maskz_mul_ps(static_cast<__mmask16>(mask >> 16), _mm512_cvtepi32_ps(b), scale);
  }
  _mm512_storeu_ps(out, low);
  _mm512_storeu_ps(out + 16, high);
}

template <DType kType>
void unpack(const SlotLayout& layout, const uint8_t* slot, float* out) {
  const int32_t words = layout.head_dim / 32;
  for (int32_t row = 0; row < kBlockTokens; row++) {
    __m512 scale = _mm512_setzero_ps();
    if constexpr (kType == DType::kInt8 || kType == DType::kInt4) {
      uint16_t bits;
      std::memcpy(&bits, slot + layout.scales_offset + row * 2, 2);
      scale = _mm512_set1_ps(bf16_to_f32(bits));
    }
    const uint8_t* values = slot + layout.values_offset;
    uint32_t next = 0;
    if (layout.ragged) {
      uint16_t offset;
      std::memcpy(&offset, slot + layout.offsets_offset + row * 2, 2);
      next = offset;
    } else {
      values += row * layout.row_bytes;
    }
    for (int32_t w = 0; w < words; w++) {
      uint32_t mask = 0xffffffff;
      if (!layout.dense) std::memcpy(&mask, slot + (row * layout.mask_words + w) * 4, 4);
      expand<kType>(values, next, mask, scale, out);
      next += static_cast<uint32_t>(__builtin_popcount(mask));
      out += 32;
    }
  }
}

}  // namespace

void unpack_slot_avx512(const SlotLayout& layout, const uint8_t* slot, float* out) {
  if (layout.head_dim % 32 != 0) return unpack_slot(layout, slot, out);
  switch (layout.dtype) {
    case DType::kF32:
      return unpack<DType::kF32>(layout, slot, out);
    case DType::kF16:
      return unpack<DType::kF16>(layout, slot, out);
    case DType::kBF16:
      return unpack<DType::kBF16>(layout, slot, out);
    case DType::kInt8:
      return unpack<DType::kInt8>(layout, slot, out);
    case DType::kInt4:
      return unpack<DType::kInt4>(layout, slot, out);
    case DType::kCoded:
      return;  // unpack_coded_slot's, which has the table
  }
}

}  // namespace mustafar
