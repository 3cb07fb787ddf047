// The transform code: rows in a basis that a profile comes with, where every dim has a number of
// bits that is fixed by the energy that was seen in it, not by the row. No masks.
//
// A row is its codes end to end, dim 0 first: a string of bits, the least significant of every byte
// and code first, of row_bytes bytes exactly. The widths of dims differ between layers, KV heads, K
// and V, their sum does not: slots stay of one size. No width is over 7, so that the codes of eight
// neighbouring dims lie in eight bytes, wherever they start.
//
// A dim of width w and standard deviation sigma has 2^w levels, half a step off zero, and a row has
// one scale c:
//
//     value = (code - 2^(w-1) + 1/2) * coded_step(w) * sigma * c
//
// c is the row's root mean square in units of the sigmas times one of kScaleFactors, whichever
// leaves the smallest sum of fourth powers of errors: a row with one large value wants coarser
// steps, and it is the large errors that change what attention does, more so than squares say.
#pragma once

#include <cstdint>

#include "format/block_format.h"

namespace mustafar {

inline constexpr int32_t kMaxWidth = 7;    // bits
inline constexpr int32_t kScaleBytes = 2;  // of a row's scale
inline constexpr int32_t kSumLanes = 16;   // partial sums of a row, of dims i mod 16, then halves
inline constexpr int32_t kScaleChoices = 8;
// Powers of 2^(1/4), from -2 to 5.
inline constexpr float kScaleFactors[kScaleChoices] = {0.70710678f, 0.84089642f, 1.0f, 1.18920712f,
                                                       1.41421356f, 1.68179283f, 2.0f, 2.37841423f};
inline constexpr float kLeastScale = 0x1p-100f;  // what is less counts as zero where it divides

// What codes the rows of one layer, KV head and kind.
struct CodeTable {
  const uint8_t* widths = nullptr;  // [head_dim], 0 to 7, adding up to 8 * row_bytes
  const float* sigmas = nullptr;    // [head_dim], not negative
};

// The tables of all layers and KV heads, in memory of the device.
struct CodeTables {
  const uint8_t* k_widths = nullptr;  // [n_layers][n_kv_heads][head_dim], as all of them
  const uint8_t* v_widths = nullptr;
  const float* k_sigmas = nullptr;
  const float* v_sigmas = nullptr;
};

MUSTAFAR_HOST_DEVICE inline CodeTable code_table(const CodeTables& tables,
                                                 const StoreLayout& layout, int32_t layer,
                                                 int32_t head, bool is_key) {
  const int64_t at = (int64_t{layer} * layout.n_kv_heads + head) * layout.k.head_dim;
  return {(is_key ? tables.k_widths : tables.v_widths) + at,
          (is_key ? tables.k_sigmas : tables.v_sigmas) + at};
}

// A step of width w in units of the dim's standard deviation in its row: about 1.1 times the steps
// that are best for Gaussian dims. 0 for width 0.
MUSTAFAR_HOST_DEVICE inline float coded_step(int32_t width) {
  switch (width) {
    case 1:
      return 1.72f;
    case 2:
      return 1.08f;
    case 3:
      return 0.65f;
    case 4:
      return 0.38f;
    case 5:
      return 0.2175f;
    case 6:
      return 0.1225f;
    case 7:
      return 0.068125f;
    default:
      return 0.0f;
  }
}

// Deals 8 * row_bytes bits to the dims of a head: one at a time, to the dim whose square error it
// lowers most; of equals, to the first. sigmas: [head_dim]; widths: out [head_dim]. row_bytes: at
// most coded_row_bytes(head_dim, 7).
void deal_widths(const float* sigmas, int32_t head_dim, int32_t row_bytes, uint8_t* widths);

// The square error that is expected of rows whose widths are so dealt, summed over dims, for every
// number of bytes 4, 8, ... 4 * n_words: errors out, [n_words]. sigmas: [head_dim].
void coded_errors(const float* sigmas, int32_t head_dim, int32_t n_words, double* errors);

// A head's table as packing wants it, [head_dim] each.
struct CodeRow {
  const float* inverse_sigma;
  const float* step;          // 0 where the width is
  const float* inverse_step;  // likewise
  const float* half;          // 2^(w-1)
  const float* top;           // 2^w - 1
};

// memory: [5][head_dim], which the result points to.
CodeRow make_code_row(const CodeTable& table, int32_t head_dim, float* memory);

// Writes a whole slot, every byte of it. rows: [64][head_dim]. Returns the first row that is not
// finite, or too large to have a scale (then the slot is undefined), or -1.
int32_t pack_coded_block(const SlotLayout& layout, const CodeTable& table, const float* rows,
                         uint8_t* slot);

// out: [head_dim].
void unpack_coded_row(const SlotLayout& layout, const CodeTable& table, const uint8_t* slot,
                      int32_t row, float* out);

// out: [64][head_dim].
void unpack_coded_slot(const SlotLayout& layout, const CodeTable& table, const uint8_t* slot,
                       float* out);

}  // namespace mustafar
