// The settings that have names. Bytes are of a compressed token against 2 bytes a value at head_dim
// 64; losses of perplexity are SmolLM2-135M-Instruct's on two texts (docs/results/quality.md).
#include <array>
#include <stdexcept>

#include "mustafar/kv_config.h"
#include "mustafar/profile.h"

namespace mustafar {
namespace {

KVConfig dense(ValueType type) {
  KVConfig config;
  config.value_dtype = type;
  return config;
}

KVConfig coded(double bits) {
  KVConfig config = dense(ValueType::kCoded);
  config.bits = bits;
  return config;
}

KVConfig sparse(double sparsity, ValueType type) {
  KVConfig config = dense(type);
  config.sparsity = sparsity;
  return config;
}

}  // namespace

std::span<const KVPreset> kv_presets() {
  static const std::array<KVPreset, 5> presets = {{
      {"dense", "as computed: 100 % of the bytes", dense(ValueType::kAuto), "none"},
      {"lossless", "8 bits: 52 %, perplexity +0.0 %", dense(ValueType::kInt8), "none"},
      {"balanced", "4 bits, rotated: 27 %, +0.2 to 0.6 %", dense(ValueType::kInt4), "hadamard"},
      {"small", "3 bits by energy: 20 %, +0.2 to 0.9 % up to 2K tokens, +3 % at 8K", coded(3),
       "auto"},
      {"mustafar", "half of the values, 8 bits: 33 %, +0.2 to 2.7 %", sparse(0.5, ValueType::kInt8),
       "none"},
  }};
  return presets;
}

const KVPreset& find_kv_preset(const std::string& name) {
  std::string names;
  for (const KVPreset& preset : kv_presets()) {
    if (name == preset.name) return preset;
    names += (names.empty() ? "" : ", ") + std::string(preset.name);
  }
  throw std::invalid_argument("the KV preset must be one of " + names + ", not \"" + name + "\"");
}

KVConfig KVConfig::preset(const std::string& name, const Model& model) {
  const KVPreset& preset = find_kv_preset(name);
  KVConfig config = preset.config;
  config.profile = Profile::resolve(preset.profile, model);
  return config;
}

}  // namespace mustafar
