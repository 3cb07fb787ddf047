// Model shapes by name, for benchmarks with random weights.
#pragma once

#include <string>

#include "mustafar/model_config.h"

namespace mustafar::cli {

// "llama-3.2-1b", or with a number of layers "llama-3-8b:2". Throws std::invalid_argument listing
// the names.
ModelConfig parse_shape(const std::string& text);

}  // namespace mustafar::cli
