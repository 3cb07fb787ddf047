// The architecture of a Llama-like model, as read from config.json.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "mustafar/sampling.h"

namespace mustafar {

enum class RopeScaling : uint8_t { kNone, kLinear, kLlama3, kYarn, kLongRope, kDynamic };

// "none", "linear", "llama3", "yarn", "longrope", "dynamic".
const char* rope_scaling_name(RopeScaling scaling);

// RMS norms of queries and keys before RoPE: none; of every head alone; of a whole projection.
enum class QkNorm : uint8_t { kNone, kHead, kProjection };

// What a family does otherwise than Llama; the defaults are Llama's.
struct FamilyTraits {
  QkNorm qk_norm = QkNorm::kNone;   // kHead: Qwen3; kProjection: OLMo-2
  bool norm_after = false;          // attention and MLP norm what they put out, not what they read
  bool fused_projections = false;   // q, k and v are rows of one tensor, gate and up of another
  std::vector<bool> rope_layers;    // [n_layers]: whether RoPE turns queries and keys; empty: all
  std::vector<bool> window_layers;  // [n_layers]: whether attention sees a window; empty: all do,
                                    // where the model has one
  double embedding_multiplier = 1.0;
  double residual_multiplier = 1.0;   // of what attention and MLP add
  double attention_multiplier = 0.0;  // of scores, before softmax; 0: 1 / sqrt(head_dim)
  double logits_scaling = 1.0;        // logits are divided by it

  bool rotates(int32_t layer) const {
    return rope_layers.empty() || rope_layers[static_cast<size_t>(layer)];
  }
};

struct ModelConfig {
  std::string model_type;  // "llama", "mistral", "qwen2", "qwen3", "phi3", ...
  int32_t hidden_size = 0;
  int32_t intermediate_size = 0;
  int32_t n_layers = 0;
  int32_t n_heads = 0;
  int32_t n_kv_heads = 0;
  int32_t head_dim = 0;                 // even
  int32_t vocab_size = 0;               // rows of the embedding
  int32_t max_position_embeddings = 0;  // tokens of context
  // Tokens, its own among them, that a query sees in the layers which have a window: fewer than
  // the context. 0: none.
  int32_t sliding_window = 0;
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000.0;
  RopeScaling rope_scaling = RopeScaling::kNone;
  int32_t rotary_dim = 0;                 // leading dims of a head that RoPE turns, even; 0: all
  double rope_factor = 1.0;               // linear, llama3, yarn, longrope, dynamic
  double rope_low_freq_factor = 1.0;      // llama3
  double rope_high_freq_factor = 4.0;     // llama3
  int32_t rope_original_context = 8192;   // llama3, yarn, longrope, tokens
  double rope_attention_factor = 1.0;     // yarn, longrope: of what RoPE turns, q and k alike
  double rope_beta_fast = 32.0;           // yarn, turns over the original context
  double rope_beta_slow = 1.0;            // yarn
  bool rope_truncate = true;              // yarn: its ramp begins and ends at whole dims
  std::vector<float> rope_short_factors;  // longrope, [rotary dims / 2]
  std::vector<float> rope_long_factors;   // longrope
  bool qkv_bias = false;  // q, k and v projections add a bias (Qwen2, or attention_bias)
  bool o_bias = false;    // the output projection adds a bias (attention_bias)
  bool mlp_bias = false;
  FamilyTraits traits;
  bool tie_word_embeddings = false;    // as the tensors have it, whatever the flag said
  std::string torch_dtype;             // as written: "float32", "float16", "bfloat16" or ""
  int32_t bos_token_id = -1;           // -1: none
  std::vector<int32_t> eos_token_ids;  // of config.json and generation_config.json
  SamplingDefaults sampling;           // of generation_config.json

  // Tokens that a query of a layer sees, 0: all before it.
  int32_t window_of(int32_t layer) const {
    const std::vector<bool>& layers = traits.window_layers;
    return layers.empty() || layers[static_cast<size_t>(layer)] ? sliding_window : 0;
  }
  // Layers whose queries do not see all, ascending.
  std::vector<int32_t> layers_with_windows() const;
  // Dims of a head that RoPE turns, the leading ones; even.
  int32_t rope_dims() const { return rotary_dim > 0 ? rotary_dim : head_dim; }
  // Inside the graph x is the residual stream divided by residual_multiplier, so that attention and
  // MLP add to it as they do in Llama: norms of x then take this in place of rms_norm_eps.
  double stream_norm_eps() const {
    return rms_norm_eps / (traits.residual_multiplier * traits.residual_multiplier);
  }
  // longrope has other frequencies for sequences that may grow beyond the original context.
  bool has_long_rope() const { return rope_scaling == RopeScaling::kLongRope; }
  // Inverse frequencies [rope_dims() / 2], radians per token, after rope_scaling. long_context: of
  // sequences beyond longrope's original context.
  std::vector<float> rope_inverse_frequencies(bool long_context = false) const;
};

}  // namespace mustafar
