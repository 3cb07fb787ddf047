// What of a sequence's cache lies before the window of a layer's query.
#pragma once

#include <algorithm>
#include <cstdint>

#include "backend/backend.h"

namespace mustafar {

// Tokens that a query of the layer sees, its own among them; 0: all.
[[maybe_unused]] static inline int32_t window_of(const SequenceStep& step, int32_t layer) {
  return step.windows == nullptr ? 0 : step.windows[layer];
}

// Rows that a query does not see, of each part of a cache the first ones. Within a part tokens
// stand in order: sinks, which are older than the store, lead the dense buffer, and what follows
// them there is newer.
struct HiddenRows {
  int32_t store = 0;  // of the held blocks' rows
  int32_t dense = 0;  // of the dense buffer's and, in decode, the new one
  int32_t fresh = 0;  // of the call's own
};

// first: the position of the first token that is seen.
[[maybe_unused]] static inline HiddenRows hidden_before(const SequenceStep& step, int32_t first) {
  HiddenRows hidden;
  const int32_t held_from = step.n_sinks + step.dropped_blocks * kBlockTokens;
  hidden.store = std::clamp(first - held_from, 0, step.n_blocks * kBlockTokens);
  hidden.dense =
      first < step.n_sinks
          ? std::max(first, 0)
          : std::max(step.n_sinks, first - (step.dropped_blocks + step.n_blocks) * kBlockTokens);
  hidden.fresh = std::max(first - step.fresh_pos0, 0);
  return hidden;
}

}  // namespace mustafar
