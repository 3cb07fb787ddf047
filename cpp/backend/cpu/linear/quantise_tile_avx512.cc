// The templates are over Simd, so the order of these includes matters.
// clang-format off
#include "backend/cpu/simd/avx512.h"
#include "backend/cpu/simd/math_impl.h"
#include "backend/cpu/linear/quantise_tile_impl.h"
// clang-format on

namespace mustafar {

bool quantise_tile_avx512(const Matrix& stored, const QuantisedShape& shape, int64_t tile,
                          uint8_t* codes, uint16_t* scales, uint16_t* minimums, float* scratch) {
  return quantise_tile(stored, shape, tile, codes, scales, minimums, scratch);
}

}  // namespace mustafar
