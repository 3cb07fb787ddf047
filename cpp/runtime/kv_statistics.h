// Second moments of queries, keys and values over a text: what a KV transform is calibrated from.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "core/thread_pool.h"
#include "mustafar/model.h"

namespace mustafar {

// Sums over tokens, [n_layers][n_kv_heads][D][D] each, symmetric.
struct KVStatistics {
  int64_t tokens = 0;           // that the sums are over
  std::vector<double> keys;     // k^T k, after RoPE
  std::vector<double> values;   // v^T v
  std::vector<double> queries;  // q^T q, after RoPE, summed over the KV head's query heads
  std::vector<double> outputs;  // W_o,h^T W_o,h of the output projection, summed likewise
};

// Runs every sequence through a dense cache. skip: first tokens of each that the sums leave out.
// pool: makes the sums. between: called now and then with tokens done and in all; may throw to
// stop. Throws std::invalid_argument for a bad token id, ContextOverflow for too long a sequence.
KVStatistics gather_kv_statistics(const Model& model,
                                  std::span<const std::vector<int32_t>> sequences, int32_t skip,
                                  ThreadPool& pool,
                                  const std::function<void(int64_t, int64_t)>& between = {});

}  // namespace mustafar
