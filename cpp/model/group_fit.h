// Scales, zeros and codes for weights: the arithmetic of making a folder of quantised weights.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/backend.h"
#include "core/thread_pool.h"
#include "format/group_codes.h"

namespace mustafar {

inline constexpr int kFitRows = 16;  // that are fitted together, a lane each

// How a group's codes become weights, for each of kFitRows rows.
struct GroupScales {
  float scale[kFitRows];  // as its dtype stores it, above 0
  float zero[kFitRows];   // an integer
};

// The scales and zeros with which n weights of every row lose least, counted in squares that
// `importance` [n] weighs (null: all alike). x: [n][kFitRows]. A scale is infinite or NaN where
// scale_dtype has none for the row's weights, or those are not finite.
GroupScales fit_group(const GroupFormat& format, const float* x, const float* importance,
                      int64_t n);

// The code of a weight.
inline float nearest_code(float x, float scale, float zero, float top) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the sum has no bits below 1
  float level = x / scale + zero;
  level = level < 0.0f ? 0.0f : level;
  level = level > top ? top : level;
  return (level + kMagic) - kMagic;
}

// Rows [row0, row0 + kFitRows) of a stored matrix, transposed: out [cols][kFitRows], zero where
// there is no row.
void load_rows(const Matrix& stored, int64_t row0, float* out);

// Puts the codes of inputs [col, col + n) and the scales of their group, lane by lane, where they
// belong. q: [n][kFitRows].
void store_group(const GroupScales& scales, const float* q, int64_t row0, int64_t col, int64_t n,
                 GroupCodes& out);

// Every weight to its nearest code. out: has the shape of stored. False where a weight is not
// finite, or no scale holds a group.
bool round_matrix(const Matrix& stored, ThreadPool& pool, GroupCodes& out);

}  // namespace mustafar
