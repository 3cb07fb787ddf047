// What a text's activations say of every matrix's inputs, layer after layer, while the matrices are
// quantised: the inputs of each come from a model whose earlier matrices are rounded already.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "format/group_codes.h"
#include "model/error_feedback.h"
#include "mustafar/model.h"

namespace mustafar {

// Rounds the tensor of this name; none: it stays as it is.
using RoundTensor =
    std::function<std::optional<GroupCodes>(const std::string& name, const InputMoments& moments)>;

// Calls round for every matrix of every layer, in the order in which a token meets them, but for
// the MLP's last beside its first. The model is on the CPU; its activations of all tokens are kept
// in f32, and one layer's matrices. between: called with parts of the work done and in all; may
// throw to stop. Throws std::invalid_argument for a bad token id, ContextOverflow, OutOfMemory, and
// Error where activations are not finite.
void calibrate_layers(const Model& model, std::span<const std::vector<int32_t>> pieces,
                      const RoundTensor& round,
                      const std::function<void(int64_t done, int64_t total)>& between);

}  // namespace mustafar
