// Prune and compress on the device: Backend::commit.
#pragma once

#include <cstdint>

#include "backend/cache_view.h"
#include "core/dtype.h"
#include "cuda/device.h"

namespace mustafar::cuda {

constexpr int32_t kMaxHeadDim = 256;
constexpr int32_t kAllFinite = 0x7fffffff;
constexpr int32_t kBadRowPositions = 1 << 20;  // positions that bad_row tells apart

struct CompressArgs {
  const CommitView* steps = nullptr;  // [n_steps] on the device
  int32_t n_steps = 0;
  int32_t max_new_blocks = 0;  // of any step
  StoreLayout layout;          // of every step
  int32_t first_layer = 0, n_layers = 0;
  DType tail_dtype = DType::kBF16;
  // One int32 on the device: lowered to the smallest (layer * 2 + is_value) * kBadRowPositions +
  // position of the rows that must be quantised and are not finite; kAllFinite where there is none.
  int32_t* bad_row = nullptr;
};

// Fills the new pages' slots. Byte-equal to format/pack.h under format/prune.h's masks, and to
// format/coded.h.
void compress(const CompressArgs& args, Stream stream);

// The part of compress() that fills ragged slots.
void compress_ragged(const CompressArgs& args, Stream stream);

// compress() of coded rows, keys and values.
void compress_coded(const CompressArgs& args, Stream stream);

// Then moves what stays dense (sinks, and the tokens after the new blocks) to dense_out.
void move_rest(const CompressArgs& args, Stream stream);

}  // namespace mustafar::cuda
