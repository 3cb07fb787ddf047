// JSON as the files of model folders have it.
#pragma once

#include <string_view>

#include "core/json_tree.h"

namespace mustafar {

// Python writes NaN, Infinity and -Infinity where a number is none, which JSON does not have. Here
// they become strings of that name: a field that nobody reads does no harm, and one that should be
// a number is refused with what it says. Throws nlohmann::json::exception for what is not JSON
// otherwise.
JsonTree<> parse_json_text(std::string_view text);

}  // namespace mustafar
