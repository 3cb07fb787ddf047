// Decode attention for AArch64 Advanced SIMD. A tile's rows are expanded (a table of byte shuffles,
// eight dims at a time) and widened to f32 in scratch, once for all query heads; then one f32
// kernel takes up to four query heads at a time.
#include <arm_neon.h>

#include "backend/cpu/attention/decode_common.h"
#include "backend/cpu/attention/expand_table.h"

namespace mustafar {
namespace {

inline void prefetch_lines(const uint8_t*& at, int32_t lines) {
  for (int32_t i = 0; i < lines; i++, at += 64) __builtin_prefetch(at);
}

// Eight 16-bit floats to f32.
inline void widen_words(uint16x8_t x, DType dtype, float* out) {
  if (dtype == DType::kF16) {
    const float16x8_t h = vreinterpretq_f16_u16(x);
    vst1q_f32(out, vcvt_f32_f16(vget_low_f16(h)));
    vst1q_f32(out + 4, vcvt_f32_f16(vget_high_f16(h)));
    return;
  }
  vst1q_f32(out, vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(x), 16)));
  vst1q_f32(out + 4, vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(x), 16)));
}

// Eight codes, scaled, to f32.
inline void widen_codes(int8x8_t x, float scale, float* out) {
  const int16x8_t words = vmovl_s8(x);
  vst1q_f32(out, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))), scale));
  vst1q_f32(out + 4, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_high_s16(words))), scale));
}

// int4 codes, two to a byte, to int8. n_bytes is rounded up to 8.
void widen_int4(const uint8_t* codes, int32_t n_bytes, uint8_t* out) {
  for (int32_t i = 0; i < n_bytes; i += 8) {
    const int8x8_t bytes = vreinterpret_s8_u8(vld1_u8(codes + i));
    const int8x8_t low = vshr_n_s8(vshl_n_s8(bytes, 4), 4), high = vshr_n_s8(bytes, 4);
    const int8x8x2_t pairs = vzip_s8(low, high);
    vst1_u8(out + 2 * i, vreinterpret_u8_s8(pairs.val[0]));
    vst1_u8(out + 2 * i + 8, vreinterpret_u8_s8(pairs.val[1]));
  }
}

// Dense values of a row, as stored, to f32.
void widen_row(DType dtype, const uint8_t* values, int32_t head_dim, float scale, float* out) {
  for (int32_t d = 0; d < head_dim; d += 8) {
    if (dtype == DType::kF32) {
      vst1q_f32(out + d, vld1q_f32(reinterpret_cast<const float*>(values) + d));
      vst1q_f32(out + d + 4, vld1q_f32(reinterpret_cast<const float*>(values) + d + 4));
    } else if (dtype == DType::kF16 || dtype == DType::kBF16) {
      widen_words(vld1q_u16(reinterpret_cast<const uint16_t*>(values) + d), dtype, out + d);
    } else {
      widen_codes(vreinterpret_s8_u8(vld1_u8(values + d)), scale, out + d);
    }
  }
}

// Sparse values of a row to f32. mask: [head_dim / 8] bytes.
void expand_row(DType dtype, const uint8_t* mask, const uint8_t* values, int32_t head_dim,
                float scale, float* out) {
  for (int32_t d = 0; d < head_dim; d += 8) {
    const uint32_t bits = mask[d / 8];
    const int32_t n = __builtin_popcount(bits);
    if (dtype == DType::kF32) {
      const float* x = reinterpret_cast<const float*>(values);
      for (int32_t i = 0, next = 0; i < 8; i++) out[d + i] = bits >> i & 1 ? x[next++] : 0.0f;
      values += 4 * n;
    } else if (dtype == DType::kF16 || dtype == DType::kBF16) {
      const uint8x16_t x = vqtbl1q_u8(vld1q_u8(values), vld1q_u8(kExpandTable.words[bits]));
      widen_words(vreinterpretq_u16_u8(x), dtype, out + d);
      values += 2 * n;
    } else {
      const uint8x16_t x = vcombine_u8(vld1_u8(values), vdup_n_u8(0));
      const uint8x8_t codes = vqtbl1_u8(x, vld1_u8(kExpandTable.bytes[bits]));
      widen_codes(vreinterpret_s8_u8(codes), scale, out + d);
      values += n;
    }
  }
}

// A slot's rows in f32; fetches another slot meanwhile.
void unpack_tile(const SlotLayout& layout, const uint8_t* slot, uint8_t* widened,
                 const uint8_t* next, float* out) {
  const uint8_t* values = slot + layout.values_offset;
  int64_t row_bytes = layout.row_bytes;
  if (layout.dtype == DType::kInt4) {
    widen_int4(values, kTileTokens * layout.row_bytes, widened);
    values = widened;
    row_bytes *= 2;
  }
  const int32_t lines = next == nullptr ? 0 : (layout.slot_bytes / 64 + 63) / 64;
  for (int32_t t = 0; t < kTileTokens; t++) {
    prefetch_lines(next, lines);
    float scale = 0.0f;
    if (has_scales(layout.dtype)) {
      uint16_t bits;
      __builtin_memcpy(&bits, slot + layout.scales_offset + 2 * t, 2);
      scale = bf16_to_f32(bits);
    }
    float* row = out + int64_t{t} * layout.head_dim;
    if (layout.dense) {
      widen_row(layout.dtype, values + t * row_bytes, layout.head_dim, scale, row);
    } else {
      expand_row(layout.dtype, slot + t * layout.mask_words * 4, values + t * row_bytes,
                 layout.head_dim, scale, row);
    }
  }
}

// 2^x; 0 below -126, NaN for NaN.
inline float32x4_t exp2_f32(float32x4_t x) {
  const uint32x4_t tiny = vcltq_f32(x, vdupq_n_f32(-126.0f));
  x = vmaxq_f32(x, vdupq_n_f32(-126.0f));
  const float32x4_t n = vrndnq_f32(x);
  const float32x4_t f = vsubq_f32(x, n);
  float32x4_t p = vdupq_n_f32(kExp2Terms[0]);
#pragma GCC unroll 6
  for (int i = 1; i < 7; i++) p = vfmaq_f32(vdupq_n_f32(kExp2Terms[i]), p, f);
  const int32x4_t power = vshlq_n_s32(vcvtnq_s32_f32(n), 23);
  p = vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), power));
  return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(p), tiny));
}

// One tile (tokens [first, n), f32 rows) for NH query heads from `head` on. q: scaled.
template <int NH>
void tile_heads(const DecodeRun& run, const float* q, const float* k, const float* v, int32_t first,
                int32_t n, int32_t head) {
  const int32_t head_dim = run.head_dim;
  alignas(16) float weights[NH][kTileTokens];
  for (int32_t t = first; t < n; t++) {
    float32x4_t acc[NH];
    for (int h = 0; h < NH; h++) acc[h] = vdupq_n_f32(0.0f);
    for (int32_t d = 0; d < head_dim; d += 4) {
      const float32x4_t x = vld1q_f32(k + int64_t{t} * head_dim + d);
      for (int h = 0; h < NH; h++) acc[h] = vfmaq_f32(acc[h], x, vld1q_f32(q + h * head_dim + d));
    }
    for (int h = 0; h < NH; h++) weights[h][t] = vaddvq_f32(acc[h]);
  }
  float rescale[NH];
  for (int h = 0; h < NH; h++) {
    const float before = run.max[head + h];
    float max = before;
    for (int32_t t = first; t < n; t++) max = weights[h][t] > max ? weights[h][t] : max;
    for (int32_t t = 0; t < first; t++) weights[h][t] = -__builtin_inff();
    for (int32_t t = n; t < kTileTokens; t++) weights[h][t] = -__builtin_inff();
    const float shift = max == -__builtin_inff() ? 0.0f : max;
    rescale[h] = before == max ? 1.0f : vgetq_lane_f32(exp2_f32(vdupq_n_f32(before - shift)), 0);
    float32x4_t sum = vdupq_n_f32(0.0f);
    for (int32_t t = 0; t < kTileTokens; t += 4) {
      const float32x4_t p = exp2_f32(vsubq_f32(vld1q_f32(&weights[h][t]), vdupq_n_f32(shift)));
      vst1q_f32(&weights[h][t], p);
      sum = vaddq_f32(sum, p);
    }
    run.max[head + h] = max;
    run.sum[head + h] = run.sum[head + h] * rescale[h] + vaddvq_f32(sum);
  }
  for (int32_t d = 0; d < head_dim; d += 16) {
    float32x4_t acc[NH][4];
    for (int h = 0; h < NH; h++) {
      const float* o = run.o + int64_t{head + h} * head_dim + d;
      for (int i = 0; i < 4; i++) acc[h][i] = vmulq_n_f32(vld1q_f32(o + 4 * i), rescale[h]);
    }
    for (int32_t t = first; t < n; t++) {
      const float* row = v + int64_t{t} * head_dim + d;
      float32x4_t x[4];
      for (int i = 0; i < 4; i++) x[i] = vld1q_f32(row + 4 * i);
      for (int h = 0; h < NH; h++) {
        for (int i = 0; i < 4; i++) acc[h][i] = vfmaq_n_f32(acc[h][i], x[i], weights[h][t]);
      }
    }
    for (int h = 0; h < NH; h++) {
      float* o = run.o + int64_t{head + h} * head_dim + d;
      for (int i = 0; i < 4; i++) vst1q_f32(o + 4 * i, acc[h][i]);
    }
  }
}

}  // namespace

void decode_run_neon(const DecodeRun& run) {
  const int32_t head_dim = run.head_dim;
  const int64_t query_floats = int64_t{run.n_queries} * head_dim;
  uint8_t* at = run.scratch;
  float* k = take<float>(at, int64_t{kTileTokens} * head_dim);
  float* v = take<float>(at, int64_t{kTileTokens} * head_dim);
  uint8_t* widened = take<uint8_t>(at, int64_t{kTileTokens} * head_dim + 64);
  float* q = take<float>(at, query_floats);
  for (int64_t i = 0; i < query_floats; i++) q[i] = run.q[i] * run.q_scale;
  clear_softmax(run.n_queries, run.max, run.sum);
  __builtin_memset(run.o, 0, query_floats * 4);

  const int32_t n_blocks = run.sequence->n_blocks, end = run.first_tile + run.n_tiles;
  for (int32_t tile = run.first_tile; tile < end; tile++) {
    int32_t n = kTileTokens;
    if (tile < n_blocks) {
      const uint8_t* page = run.sequence->pages[tile];
      const bool more = tile + 1 < end && tile + 1 < n_blocks;
      const uint8_t* next = more ? run.sequence->pages[tile + 1] : nullptr;
      unpack_tile(*run.k_slot, page + run.k_offset, widened, more ? next + run.k_offset : nullptr,
                  k);
      unpack_tile(*run.v_slot, page + run.v_offset, widened, more ? next + run.v_offset : nullptr,
                  v);
    } else {
      const DenseTile dense = dense_tile(run, tile);
      const int64_t row_bytes = dtype_bytes(run.tail_dtype, head_dim);
      n = dense.n;
      for (int32_t t = 0; t < n; t++) {
        widen_row(run.tail_dtype, dense.k + t * row_bytes, head_dim, 0.0f, k + t * head_dim);
        widen_row(run.tail_dtype, dense.v + t * row_bytes, head_dim, 0.0f, v + t * head_dim);
      }
    }
    const int32_t first = tile == 0 ? run.hidden_rows : 0;
    for_query_groups(run.n_queries, [&]<int NH>(int32_t head) {
      tile_heads<NH>(run, q + int64_t{head} * head_dim, k, v, first, n, head);
    });
  }
}

}  // namespace mustafar
