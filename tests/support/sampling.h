// Sampling parameters that many tests use.
#pragma once

#include <cstdint>

#include "mustafar/sampling.h"

namespace mustafar::testing {

// n of the likeliest tokens, whatever they are.
inline SamplingParams greedy(int32_t n) {
  SamplingParams params;
  params.temperature = 0;
  params.max_new_tokens = n;
  params.ignore_eos = true;
  return params;
}

// n tokens at random.
inline SamplingParams sampled(int32_t n, uint64_t seed) {
  SamplingParams params;
  params.max_new_tokens = n;
  params.temperature = 0.9;
  params.seed = seed;
  params.ignore_eos = true;
  return params;
}

}  // namespace mustafar::testing
