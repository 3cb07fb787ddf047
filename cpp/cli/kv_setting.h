// Cache settings as one word each, for lists of them: "sparsity=0.5,value_dtype=int8,sinks=4".
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "mustafar/kv_config.h"
#include "mustafar/model.h"

namespace mustafar::cli {

// One setting: items with commas between them, each key=value; the first may be the name of a
// preset or "default", which the others change. Keys: sparsity, k_sparsity, v_sparsity, pattern,
// window, sinks, value_dtype, bits, k_bits, v_bits, budget_bytes_per_token, max_kld, k_policy,
// v_policy, profile. Throws std::invalid_argument naming what it does not know or can't read,
// ModelError for a profile that does not fit the model.
KVConfig parse_kv_setting(const std::string& text, const Model& model);

// The settings of a list: semicolons (or, between bare names, commas) part them.
std::vector<std::string> split_kv_settings(const std::string& list);

// The settings of a file: one a line, what follows a # is a comment. Throws Error for a file that
// can't be read.
std::vector<std::string> read_kv_settings(const std::string& file);

// All that a setting changes in results, the profile by its hash.
nlohmann::ordered_json identity_json(const KVConfig& config);

}  // namespace mustafar::cli
