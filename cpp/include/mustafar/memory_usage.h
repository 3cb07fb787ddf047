// What one session's cache takes.
#pragma once

#include <cstdint>

namespace mustafar {

// Measured bytes of one session's cache. Pages shared by a fork count in each of its owners.
struct MemoryUsage {
  // The same tokens, dense, at 2 bytes a value; of layers with a sliding window those inside it.
  int64_t dense_equivalent = 0;
  int64_t masks = 0;  // in the compressed store
  int64_t values = 0;
  int64_t scales = 0;
  int64_t padding = 0;            // alignment inside pages
  int64_t tail = 0;               // dense sinks and tail, room for more tokens included
  int64_t policy = 0;             // statistics that a pruning policy keeps
  int64_t allocated = 0;          // the sum of masks, values, scales, padding, tail and policy
  int64_t used = 0;               // of that, all but the tail's room for more tokens
  int64_t compressed_tokens = 0;  // in the store, without those that it has dropped
  int64_t dense_tokens = 0;
  double k_sparsity = 0;  // of the compressed store, as stored
  double v_sparsity = 0;
};

}  // namespace mustafar
