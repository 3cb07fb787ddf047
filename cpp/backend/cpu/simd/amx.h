// The tile registers of AMX: eight of 16 rows of 64 bytes. Included by the files of the AMX path
// alone.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace mustafar {
namespace {

constexpr int32_t kAmxWords = 16;  // of a row
constexpr int32_t kAmxRowBytes = 64;
constexpr int32_t kAmxTileBytes = 16 * kAmxRowBytes;

// What the processor reads: all eight tiles are whole.
struct alignas(64) AmxConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Static: some compilers let the intrinsic read 8 bytes only, and drop the rest of a local.
inline void configure_amx() {
  static constexpr AmxConfig kConfig;
  _tile_loadconfig(&kConfig);
}

inline void release_amx() { _tile_release(); }

// The instructions with tiles as template arguments. As assembly, since the compiler's own do not
// say that a load reads memory, and stores before it may then come after.
template <int kTile>
inline void amx_load(const void* base, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
               :
               : "r"(base), "r"(stride_bytes), "i"(kTile)
               : "memory");
}
template <int kTile>
inline void amx_store(void* base, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)"
               :
               : "r"(base), "r"(stride_bytes), "i"(kTile)
               : "memory");
}
template <int kTile>
inline void amx_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
// sums += rows x columns, of bf16 pairs or of signed bytes in fours.
template <int kSums, int kRows, int kColumns>
inline void amx_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kRows), "i"(kColumns));
}
template <int kSums, int kRows, int kColumns>
inline void amx_dot_int8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kRows), "i"(kColumns));
}
// Rows of signed bytes, columns of unsigned ones.
template <int kSums, int kRows, int kColumns>
inline void amx_dot_codes() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kRows), "i"(kColumns));
}

}  // namespace
}  // namespace mustafar
