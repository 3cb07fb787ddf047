// How much energy dims of keys may have where texts stand elsewhere in a context.
#pragma once

#include <cstdint>
#include <vector>

#include "mustafar/model_config.h"

namespace mustafar {

// Where texts are taken to begin: 0, 1024, 1536, 2048, 3072 and so on, two an octave, below
// `context` tokens.
std::vector<int64_t> text_offsets(int64_t context);

// [head_dim] the most that the mean square of each dim of k F is where the texts begin at one of
// these offsets. RoPE turns the keys of a text that begins later by an angle that is the same for
// all of them, so this needs no second pass. moment: E[k^T k] where the texts stand; forward: F;
// [head_dim][head_dim] both.
std::vector<double> most_energies(const ModelConfig& config, const std::vector<int64_t>& offsets,
                                  const std::vector<double>& moment,
                                  const std::vector<double>& forward);

}  // namespace mustafar
