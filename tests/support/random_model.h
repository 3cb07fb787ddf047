// Small models of random weights, made in memory, and token ids for them.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "mustafar/model.h"
#include "runtime/model_impl.h"

namespace mustafar::testing {

inline constexpr int32_t kSmallVocab = 97;

struct SmallShape {
  int32_t hidden_size = 48;
  int32_t intermediate_size = 80;
  int32_t n_layers = 3;
  int32_t head_dim = 16;
  int32_t vocab_size = kSmallVocab;
  int32_t max_position_embeddings = 600;
};

// 4 heads over 2 KV heads; token 2 ends a sequence.
inline ModelConfig small_config(const SmallShape& shape = {}) {
  ModelConfig c;
  c.model_type = "llama";
  c.hidden_size = shape.hidden_size;
  c.intermediate_size = shape.intermediate_size;
  c.n_layers = shape.n_layers;
  c.n_heads = 4;
  c.n_kv_heads = 2;
  c.head_dim = shape.head_dim;
  c.vocab_size = shape.vocab_size;
  c.max_position_embeddings = shape.max_position_embeddings;
  c.eos_token_ids = {2};
  return c;
}

// The same weights every time; the GPU's and the CPU's are equal. threads: of the CPU. weights:
// what they are rounded to.
inline Model random_model(const ModelConfig& config, const std::string& device, int32_t threads,
                          DType dtype, int64_t kv_budget = 0, const std::string& weights = "auto") {
  ModelOptions options;
  options.device = device;
  options.threads = threads;
  options.kv_budget = kv_budget;
  options.weights = weights;
  return make_model(config, random_tensors(config, dtype, /*seed=*/7), options);
}

// Half of every key and value is pruned; values of the model's type.
inline KVConfig half() {
  KVConfig kv;
  kv.sparsity = 0.5;
  kv.value_dtype = ValueType::kAuto;
  return kv;
}

// Ids below kSmallVocab; the same for the same seed.
inline std::vector<int32_t> ids_of(int64_t n, uint32_t seed = 1) {
  std::mt19937 random(seed);
  std::vector<int32_t> ids(n);
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % kSmallVocab);
  return ids;
}

}  // namespace mustafar::testing
