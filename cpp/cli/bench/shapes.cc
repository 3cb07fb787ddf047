#include "cli/bench/shapes.h"

#include <cstdlib>
#include <stdexcept>

namespace mustafar::cli {
namespace {

struct Shape {
  const char* name;
  int32_t hidden, intermediate, layers, heads, kv_heads, head_dim, vocab;
  double rope_theta;
  bool tied, qkv_bias;
};

// As published in the models' config.json.
constexpr Shape kShapes[] = {
    {"llama-2-7b", 4096, 11008, 32, 32, 32, 128, 32000, 1e4, false, false},
    {"llama-2-13b", 5120, 13824, 40, 40, 40, 128, 32000, 1e4, false, false},
    {"llama-3-8b", 4096, 14336, 32, 32, 8, 128, 128256, 5e5, false, false},
    {"llama-3-70b", 8192, 28672, 80, 64, 8, 128, 128256, 5e5, false, false},
    {"llama-3.2-1b", 2048, 8192, 16, 32, 8, 64, 128256, 5e5, true, false},
    {"llama-3.2-3b", 3072, 8192, 28, 24, 8, 128, 128256, 5e5, true, false},
    {"tinyllama-1.1b", 2048, 5632, 22, 32, 4, 64, 32000, 1e4, false, false},
    {"mistral-7b", 4096, 14336, 32, 32, 8, 128, 32000, 1e4, false, false},
    {"qwen2.5-0.5b", 896, 4864, 24, 14, 2, 64, 151936, 1e6, true, true},
    {"qwen2.5-1.5b", 1536, 8960, 28, 12, 2, 128, 151936, 1e6, true, true},
    {"qwen2.5-7b", 3584, 18944, 28, 28, 4, 128, 152064, 1e6, false, true},
};

constexpr int32_t kContext = 1 << 20;  // tokens: any depth that memory allows

}  // namespace

ModelConfig parse_shape(const std::string& text) {
  const size_t colon = text.find(':');
  const std::string name = text.substr(0, colon);
  std::string names;
  for (const Shape& shape : kShapes) {
    names += (names.empty() ? "" : ", ") + std::string(shape.name);
    if (name != shape.name) continue;
    ModelConfig config;
    config.model_type = shape.qkv_bias ? "qwen2" : "llama";
    config.hidden_size = shape.hidden;
    config.intermediate_size = shape.intermediate;
    config.n_layers = shape.layers;
    config.n_heads = shape.heads;
    config.n_kv_heads = shape.kv_heads;
    config.head_dim = shape.head_dim;
    config.vocab_size = shape.vocab;
    config.max_position_embeddings = kContext;
    config.rms_norm_eps = 1e-5;
    config.rope_theta = shape.rope_theta;
    config.tie_word_embeddings = shape.tied;
    config.qkv_bias = shape.qkv_bias;
    if (colon == std::string::npos) return config;
    const std::string layers = text.substr(colon + 1);
    char* end = nullptr;
    const long n = std::strtol(layers.c_str(), &end, 10);
    if (layers.empty() || *end != 0 || n < 1 || n > 1000) {
      throw std::invalid_argument("--shape " + text +
                                  ": the layers after the colon must be 1 to 1000");
    }
    config.n_layers = static_cast<int32_t>(n);
    return config;
  }
  throw std::invalid_argument("--shape must be one of " + names +
                              ", each with an optional :LAYERS, not \"" + text + "\"");
}

}  // namespace mustafar::cli
