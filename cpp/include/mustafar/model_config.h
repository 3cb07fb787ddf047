// The architecture of a Llama-like model, as read from config.json.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "mustafar/sampling.h"

namespace mustafar {

enum class RopeScaling : uint8_t { kNone, kLinear, kLlama3 };

struct ModelConfig {
  std::string model_type;  // "llama", "mistral", "qwen2"
  int32_t hidden_size = 0;
  int32_t intermediate_size = 0;
  int32_t n_layers = 0;
  int32_t n_heads = 0;
  int32_t n_kv_heads = 0;
  int32_t head_dim = 0;                 // even
  int32_t vocab_size = 0;               // rows of the embedding
  int32_t max_position_embeddings = 0;  // tokens of context
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000.0;
  RopeScaling rope_scaling = RopeScaling::kNone;
  double rope_factor = 1.0;              // linear, llama3
  double rope_low_freq_factor = 1.0;     // llama3
  double rope_high_freq_factor = 4.0;    // llama3
  int32_t rope_original_context = 8192;  // llama3, tokens
  bool qkv_bias = false;  // q, k and v projections add a bias (Qwen2, or attention_bias)
  bool o_bias = false;    // the output projection adds a bias (attention_bias)
  bool mlp_bias = false;
  bool tie_word_embeddings = false;    // as the tensors have it, whatever the flag said
  std::string torch_dtype;             // as written: "float32", "float16", "bfloat16" or ""
  int32_t bos_token_id = -1;           // -1: none
  std::vector<int32_t> eos_token_ids;  // of config.json and generation_config.json
  SamplingDefaults sampling;           // of generation_config.json

  // Inverse frequencies [head_dim / 2], radians per token, after rope_scaling.
  std::vector<float> rope_inverse_frequencies() const;
};

}  // namespace mustafar
