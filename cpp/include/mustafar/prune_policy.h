// By what a cache chooses the values that it keeps.
#pragma once

#include <cstdint>

#include "mustafar/host_device.h"

namespace mustafar {

enum class PrunePolicy : uint8_t {
  kMagnitude,         // per token, |x|
  kOutputAware,       // K only, per token: |x| weighted by the sum of |q| over the last window
  kChannelMagnitude,  // per channel in blocks of 64 tokens, |x|
  // In blocks of 64 tokens, w the |q| above. K: |k| w over the whole block. V: per channel, |v|
  // times the token's sum of w |k|, which stands in for its attention probability.
  kChannelOutputAware,
  kChannelStructured,  // K only: whole channels per block, ranked by |q||k| (ThinK); the baseline
};

// Whether a policy ranks by |q| of the window's queries, which have to be recorded for it.
MUSTAFAR_HOST_DEVICE constexpr bool needs_queries(PrunePolicy policy) {
  return policy == PrunePolicy::kOutputAware || policy == PrunePolicy::kChannelOutputAware ||
         policy == PrunePolicy::kChannelStructured;
}

// Whether a policy fixes how many values a block keeps, not how many a token does (ragged slots).
MUSTAFAR_HOST_DEVICE constexpr bool per_channel(PrunePolicy policy) {
  return policy == PrunePolicy::kChannelMagnitude || policy == PrunePolicy::kChannelOutputAware ||
         policy == PrunePolicy::kChannelStructured;
}

}  // namespace mustafar
