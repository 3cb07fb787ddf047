// The tile registers of AMX: eight of 16 rows of 64 bytes. Included by the files of the AMX path
// alone.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace mustafar {
namespace {

constexpr int32_t kAmxWords = 16;  // of a row

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

}  // namespace
}  // namespace mustafar
