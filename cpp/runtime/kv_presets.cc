// The settings that have names. Each is on the frontier of quality and bytes as measured on a real
// model (docs/results/quality.md), or is there to compare with; a summary says its cost.
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

KVConfig sparse(double sparsity, ValueType type, Pattern pattern, int32_t sinks) {
  KVConfig config = dense(type);
  config.sparsity = sparsity;
  config.pattern = pattern;
  config.sink_tokens = sinks;
  return config;
}

}  // namespace

std::span<const KVPreset> kv_presets() {
  static const std::array<KVPreset, 4> presets = {{
      {"lossless", "every value in 8 bits", dense(ValueType::kInt8), "none"},
      {"balanced", "every value in 4 bits, rotated", dense(ValueType::kInt4), "hadamard"},
      {"small", "half of the values, in 4 bits, in a calibrated basis",
       sparse(0.5, ValueType::kInt4, Pattern::kGroup, 4), "auto"},
      {"mustafar", "the published method: 30 % of every row",
       sparse(0.7, ValueType::kAuto, Pattern::kRow, 0), "none"},
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
