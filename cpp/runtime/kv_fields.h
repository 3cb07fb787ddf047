// The fields of a KVConfig, one after another: what state files, reports, the bindings and the
// command line go through, so that a field is named, described and read in this place alone. The
// profile is not among them: each of those says it in its own way (a hash, a name, an object).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>

#include "mustafar/kv_config.h"

namespace mustafar {

// T: double, of keys and values alike; std::optional<double>, of keys or values alone, or without
// `otherwise` a field that need not be there; int32_t; or one of the enumerations.
template <typename T>
struct KVField {
  const char* name;    // in Python and in files
  const char* key;     // in a setting on one line (cli/kv_setting.h)
  const char* option;  // on the command line
  const char* help;
  T KVConfig::* member;
  double KVConfig::* otherwise = nullptr;  // of keys or values: what counts where there is no value
  bool coded_only = false;                 // of no meaning for other value types
};

// Calls visit(const KVField<T>&) for every field, in the order of state files.
template <typename Visit>
void for_each_kv_field(Visit&& visit) {
  using Overall = KVField<double>;
  using PerKind = KVField<std::optional<double>>;
  visit(Overall{"sparsity", "sparsity", "--sparsity",
                "Fraction of every row that is pruned; 0: dense", &KVConfig::sparsity});
  visit(PerKind{"k_sparsity", "k_sparsity", "--k-sparsity", "For keys alone", &KVConfig::k_sparsity,
                &KVConfig::sparsity});
  visit(PerKind{"v_sparsity", "v_sparsity", "--v-sparsity", "For values alone",
                &KVConfig::v_sparsity, &KVConfig::sparsity});
  visit(KVField<Pattern>{"pattern", "pattern", "--pattern", "group or row", &KVConfig::pattern});
  visit(KVField<int32_t>{"window", "window", "--window", "Newest tokens that stay dense",
                         &KVConfig::window});
  visit(KVField<int32_t>{"sink_tokens", "sinks", "--sinks", "First tokens that stay dense",
                         &KVConfig::sink_tokens});
  visit(KVField<ValueType>{"value_dtype", "value_dtype", "--kv-dtype",
                           "Stored values: auto (as computed), f32, f16, bf16, int8, int4, coded",
                           &KVConfig::value_dtype});
  visit(Overall{"bits", "bits", "--bits", "Of a dim on average, for --kv-dtype coded: 1 to 7",
                &KVConfig::bits, nullptr, /*coded_only=*/true});
  visit(PerKind{"k_bits", "k_bits", "--k-bits", "For keys alone", &KVConfig::k_bits,
                &KVConfig::bits, /*coded_only=*/true});
  visit(PerKind{"v_bits", "v_bits", "--v-bits", "For values alone", &KVConfig::v_bits,
                &KVConfig::bits, /*coded_only=*/true});
  visit(PerKind{"budget_bytes_per_token", "budget_bytes_per_token", "--kv-bytes-per-token",
                "In place of --bits: bytes of a compressed token over all layers, dealt to where "
                "errors were measured to count most",
                &KVConfig::budget_bytes_per_token, nullptr, /*coded_only=*/true});
  visit(PerKind{"max_kld", "max_kld", "--max-kld",
                "In place of --bits: the fewest bytes that predict at most this divergence in nats",
                &KVConfig::max_kld, nullptr, /*coded_only=*/true});
  visit(KVField<PrunePolicy>{"k_policy", "k_policy", "--k-policy",
                             "What is pruned of keys: magnitude, output_aware, channel_magnitude, "
                             "channel_output_aware, channel_structured",
                             &KVConfig::k_policy});
  visit(KVField<PrunePolicy>{"v_policy", "v_policy", "--v-policy",
                             "What is pruned of values: magnitude, channel_magnitude, "
                             "channel_output_aware",
                             &KVConfig::v_policy});
}

template <typename T>
inline constexpr bool kIsOverall = std::is_same_v<T, double>;
template <typename T>
inline constexpr bool kIsPerKind = std::is_same_v<T, std::optional<double>>;

// False of fields that need not be there and are not.
template <typename T>
bool has_kv_value(const KVConfig& config, const KVField<T>& field) {
  if constexpr (kIsPerKind<T>) return field.otherwise != nullptr || config.*field.member;
  return true;
}

// What counts of a field, printable: a double (0 where it need not be there and is not), an
// int32_t, or the name of an enumeration's value.
template <typename T>
auto kv_value(const KVConfig& config, const KVField<T>& field) {
  if constexpr (kIsPerKind<T>) {
    const double otherwise = field.otherwise == nullptr ? 0 : config.*field.otherwise;
    return (config.*field.member).value_or(otherwise);
  } else if constexpr (std::is_enum_v<T>) {
    return name_of(config.*field.member);
  } else {
    return config.*field.member;
  }
}

// Throw std::invalid_argument naming the choices.
inline void parse_kv_value(const std::string& name, Pattern& out) { out = parse_pattern(name); }
inline void parse_kv_value(const std::string& name, ValueType& out) {
  out = parse_value_type(name);
}
inline void parse_kv_value(const std::string& name, PrunePolicy& out) {
  out = parse_prune_policy(name);
}

// Sets a field; one for keys and values alike takes those for one of them along.
template <typename T>
void set_kv_field(KVConfig& config, const KVField<T>& field, const T& value) {
  config.*field.member = value;
  if constexpr (kIsOverall<T>) {
    for_each_kv_field([&]<typename Part>(const KVField<Part>& part) {
      if constexpr (kIsPerKind<Part>) {
        if (part.otherwise == field.member) (config.*part.member).reset();
      }
    });
  }
}

// Whether both make the same cache of the same rows, profiles aside.
inline bool same_kv_fields(const KVConfig& a, const KVConfig& b) {
  bool same = true;
  for_each_kv_field([&]<typename T>(const KVField<T>& field) {
    // What holds for keys and values alike is in what holds for each.
    if constexpr (!kIsOverall<T>) {
      if (field.coded_only && !a.coded()) return;
      if constexpr (kIsPerKind<T>) {
        same = same && kv_value(a, field) == kv_value(b, field);
      } else {
        same = same && a.*field.member == b.*field.member;
      }
    }
  });
  return same;
}

}  // namespace mustafar
