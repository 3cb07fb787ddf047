#include "mustafar/kv_config.h"

#include <array>
#include <cmath>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace mustafar {
namespace {

template <typename E>
using Name = std::pair<E, const char*>;

constexpr std::array<Name<Pattern>, 2> kPatterns = {{
    {Pattern::kGroup, "group"},
    {Pattern::kRow, "row"},
}};
constexpr std::array<Name<ValueType>, 7> kValueTypes = {{
    {ValueType::kAuto, "auto"},
    {ValueType::kF32, "f32"},
    {ValueType::kF16, "f16"},
    {ValueType::kBF16, "bf16"},
    {ValueType::kInt8, "int8"},
    {ValueType::kInt4, "int4"},
    {ValueType::kCoded, "coded"},
}};
constexpr std::array<Name<PrunePolicy>, 5> kPolicies = {{
    {PrunePolicy::kMagnitude, "magnitude"},
    {PrunePolicy::kOutputAware, "output_aware"},
    {PrunePolicy::kChannelMagnitude, "channel_magnitude"},
    {PrunePolicy::kChannelOutputAware, "channel_output_aware"},
    {PrunePolicy::kChannelStructured, "channel_structured"},
}};

template <typename E, size_t N>
const char* find_name(const std::array<Name<E>, N>& names, E value) {
  for (const auto& [candidate, name] : names) {
    if (candidate == value) return name;
  }
  return "?";
}

template <typename E, size_t N>
E find_value(const std::array<Name<E>, N>& names, const char* field, const std::string& text) {
  std::string choices;
  for (const auto& [value, name] : names) {
    if (text == name) return value;
    choices += (choices.empty() ? "" : ", ") + std::string(name);
  }
  throw std::invalid_argument(std::string(field) + " must be one of " + choices + ", not \"" +
                              text + "\"");
}

void check_sparsity(const char* field, double value) {
  if (value >= 0.0 && value < 1.0) return;  // false for NaN
  std::ostringstream message;
  message << field << " must be at least 0 and less than 1 (the fraction that is pruned), not "
          << value;
  throw std::invalid_argument(message.str());
}

void check_bits(const char* field, double value) {
  if (value >= 1.0 && value <= 7.0) return;  // false for NaN
  std::ostringstream message;
  message << field << " must be between 1 and 7 (bits of a dim, on average), not " << value;
  throw std::invalid_argument(message.str());
}

// A budget takes the place of bits.
void check_budget(const KVConfig& config) {
  const char* const field = config.budget_bytes_per_token ? "budget_bytes_per_token" : "max_kld";
  const double value = config.budget_bytes_per_token.value_or(config.max_kld.value_or(0));
  const auto refuse = [&](const std::string& why) {
    throw std::invalid_argument(field + (" " + why));
  };
  if (config.budget_bytes_per_token && config.max_kld) {
    refuse("and max_kld are two ways to say one thing: give one of them");
  }
  if (!(value > 0) || !std::isfinite(value)) {
    std::ostringstream message;
    message << "must be more than 0, not " << value;
    refuse(message.str());
  }
  if (!config.coded()) {
    refuse(std::string("applies to value_dtype \"coded\" alone, not to \"") +
           name_of(config.value_dtype) + "\"");
  }
  const char* const taken = config.k_bits                    ? "k_bits"
                            : config.v_bits                  ? "v_bits"
                            : config.bits != KVConfig().bits ? "bits"
                                                             : nullptr;
  if (taken != nullptr) refuse(std::string("takes the place of ") + taken + ": give one of them");
}

void check_tokens(const char* field, int32_t value) {
  constexpr int32_t kMost = 1 << 24;
  if (value >= 0 && value <= kMost) return;
  throw std::invalid_argument(std::string(field) + " must be between 0 and " +
                              std::to_string(kMost) + " tokens, not " + std::to_string(value));
}

}  // namespace

void KVConfig::validate() const {
  check_sparsity("sparsity", sparsity);
  if (k_sparsity) check_sparsity("k_sparsity", *k_sparsity);
  if (v_sparsity) check_sparsity("v_sparsity", *v_sparsity);
  check_bits("bits", bits);
  if (k_bits) check_bits("k_bits", *k_bits);
  if (v_bits) check_bits("v_bits", *v_bits);
  if (budgeted()) check_budget(*this);
  if (coded()) {
    if (effective_k_sparsity() != 0 || effective_v_sparsity() != 0) {
      throw std::invalid_argument(
          "value_dtype \"coded\" prunes nothing, so sparsity must be 0: say bits");
    }
  } else if (k_bits || v_bits) {
    throw std::invalid_argument(std::string(k_bits ? "k_bits" : "v_bits") +
                                " applies to value_dtype \"coded\" alone, not to \"" +
                                name_of(value_dtype) + "\"");
  }
  check_tokens("window", window);
  check_tokens("sink_tokens", sink_tokens);
  if (v_policy == PrunePolicy::kOutputAware || v_policy == PrunePolicy::kChannelStructured) {
    throw std::invalid_argument(std::string("v_policy \"") + name_of(v_policy) +
                                "\" ranks keys only; values take magnitude, channel_magnitude or "
                                "channel_output_aware");
  }
}

const char* name_of(Pattern pattern) { return find_name(kPatterns, pattern); }
const char* name_of(ValueType type) { return find_name(kValueTypes, type); }
const char* name_of(PrunePolicy policy) { return find_name(kPolicies, policy); }

Pattern parse_pattern(const std::string& name) { return find_value(kPatterns, "pattern", name); }
ValueType parse_value_type(const std::string& name) {
  return find_value(kValueTypes, "value_dtype", name);
}
PrunePolicy parse_prune_policy(const std::string& name) {
  return find_value(kPolicies, "policy", name);
}

}  // namespace mustafar
