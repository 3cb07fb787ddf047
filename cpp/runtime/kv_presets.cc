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
      {"dense", "as computed", dense(ValueType::kAuto), "none"},
      {"lossless", "8 bits", dense(ValueType::kInt8), "none"},
      {"balanced", "4 bits, dealt by energy", coded(4), "auto"},
      {"small", "3 bits, dealt by energy", coded(3), "auto"},
      {"mustafar", "half of the values, 8 bits each", sparse(0.5, ValueType::kInt8), "auto"},
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
