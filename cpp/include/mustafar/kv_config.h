// How a session keeps its keys and values.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "mustafar/prune_policy.h"

namespace mustafar {

class Model;
class Profile;  // a calibrated KV transform, mustafar/profile.h

enum class Pattern : uint8_t {
  kGroup,  // the same number kept in every group of 16 or 32 dims, dealt round the row
  kRow,    // ranked over the whole row, as published
};

enum class ValueType : uint8_t {
  kAuto,  // the tail's type: f16 for f16 models, f32 for f32, else bf16
  kF32,
  kF16,
  kBF16,
  kInt8,
  kInt4,
  kCoded,  // bits dealt to a profile's dims by their energy; nothing is pruned
};

// The default does no harm: every value is kept, in 8 bits (preset "lossless").
struct KVConfig {
  double sparsity = 0.0;                  // fraction of every row that is pruned, [0, 1); 0: dense
  std::optional<double> k_sparsity = {};  // for keys alone
  std::optional<double> v_sparsity = {};  // for values alone
  Pattern pattern = Pattern::kGroup;
  int32_t window = 32;      // newest tokens that stay dense
  int32_t sink_tokens = 4;  // first tokens that stay dense
  ValueType value_dtype = ValueType::kInt8;
  double bits = 3.0;                  // coded: of a dim, on average, [1, 7]
  std::optional<double> k_bits = {};  // for keys alone
  std::optional<double> v_bits = {};  // for values alone
  // Coded, in place of bits: one budget over all layers, keys and values, dealt by what errors in
  // each were measured to cost (Profile::k_cost). At most one of the two.
  std::optional<double> budget_bytes_per_token = {};  // of a compressed token in all layers, its
                                                      // scales included; never more
  std::optional<double> max_kld = {};  // nats a token: the fewest bytes that predict at most so
                                       // much divergence from the dense cache
  PrunePolicy k_policy = PrunePolicy::kMagnitude;
  PrunePolicy v_policy = PrunePolicy::kMagnitude;
  std::shared_ptr<const Profile> profile = {};  // null: none

  bool coded() const { return value_dtype == ValueType::kCoded; }
  // Whether layers have rows of different sizes, which takes a profile with costs.
  bool budgeted() const { return budget_bytes_per_token || max_kld; }
  double effective_k_sparsity() const { return k_sparsity.value_or(sparsity); }
  double effective_v_sparsity() const { return v_sparsity.value_or(sparsity); }
  double effective_k_bits() const { return k_bits.value_or(bits); }
  double effective_v_bits() const { return v_bits.value_or(bits); }

  // Throws std::invalid_argument naming the field, its value and the range.
  void validate() const;

  // A preset by its name, its profile resolved for the model (which may calibrate it). Throws
  // std::invalid_argument naming the presets.
  static KVConfig preset(const std::string& name, const Model& model);
};

// A setting with a name, and what it was measured to cost (docs/results/quality.md).
struct KVPreset {
  const char* name;
  const char* summary;  // bytes and loss, for --help
  KVConfig config;      // but for the profile
  const char* profile;  // as Profile::resolve takes it
};
std::span<const KVPreset> kv_presets();
// Throws std::invalid_argument naming the presets.
const KVPreset& find_kv_preset(const std::string& name);

// Names as the command line and Python spell them; parse throws std::invalid_argument.
const char* name_of(Pattern pattern);
const char* name_of(ValueType type);
const char* name_of(PrunePolicy policy);
Pattern parse_pattern(const std::string& name);
ValueType parse_value_type(const std::string& name);
PrunePolicy parse_prune_policy(const std::string& name);

}  // namespace mustafar
