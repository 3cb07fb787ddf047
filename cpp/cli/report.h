// What a run did, for people and for machines.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "mustafar/model.h"
#include "mustafar/sampling.h"
#include "mustafar/session.h"

namespace mustafar::cli {

nlohmann::ordered_json to_json(const MemoryUsage& memory);
nlohmann::ordered_json to_json(const KVConfig& config);
nlohmann::ordered_json to_json(const GenerateStats& stats);
nlohmann::ordered_json to_json(const ModelConfig& config);
// What is used where nothing is given, and under "from_folder" the names that the folder decides.
nlohmann::ordered_json sampling_json(const Model& model);

// "prompt 12 tokens, 345.67 tokens/s | generated 128 tokens, 45.60 tokens/s | KV 1.20 MiB,
// dense 2.40 MiB, sparsity K 0.62 V 0.75"
std::string summary(const GenerateStats& stats, const MemoryUsage& memory);

// One line of JSON, or indented; text that is not UTF-8 gets U+FFFD.
std::string dump(const nlohmann::ordered_json& json, int indent = -1);

}  // namespace mustafar::cli
