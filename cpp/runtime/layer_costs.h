// What errors in each layer's keys and values cost: the weights by which a budget of bits is dealt
// (runtime/row_budget.h), measured rather than derived.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "mustafar/model.h"
#include "mustafar/profile.h"

namespace mustafar {

// Tokens that measure_costs reports as done in all.
int64_t cost_measure_tokens(const Model& model, std::span<const std::vector<int32_t>> pieces);

// Fills in k_cost and v_cost of a profile that has sigmas: of every layer and kind, the divergence
// from the dense cache where its rows alone have 2 bits a dim and all others 7, less that of 7 bits
// everywhere, over the square error expected of those 2 bits. Scored on the first 1,024 tokens of
// the longest piece, of which it needs 200. The dense log-probabilities of them are held meanwhile:
// 4 bytes for each and every token of the vocabulary. between: called now and then with tokens done
// and in all; may throw to stop. Throws std::invalid_argument for too short a text, DeviceError
// where layers can't differ, OutOfMemory.
void measure_costs(const Model& model, std::span<const std::vector<int32_t>> pieces,
                   Profile& profile, const std::function<void(int64_t, int64_t)>& between);

}  // namespace mustafar
