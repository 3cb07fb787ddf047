// Small JSON files of a model folder.
#pragma once

#include <cstddef>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "core/json_tree.h"

namespace mustafar {

inline constexpr size_t kConfigCap = 16 << 20;  // bytes of config.json

// Reads and parses a JSON file whose top is an object. Throws ModelError naming the file for one
// that is missing, not a regular file, larger than max_bytes, not UTF-8 or not such JSON.
JsonTree<> read_json_file(const std::filesystem::path& path, size_t max_bytes);

// A short rendering of a value for messages, e.g. "the string \"12\"", "true", "-3".
std::string describe(const nlohmann::json& value);

// What the parser says, which may quote any bytes of its input, in printable ASCII.
std::string describe(const nlohmann::json::exception& error);

}  // namespace mustafar
