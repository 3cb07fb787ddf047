// The token ids that a profile is calibrated on, and their name in its metadata.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "mustafar/model.h"

namespace mustafar {

// Texts encoded (with the special tokens that the tokenizer puts first), max_tokens in all (-1: no
// limit), cut where they are longer than the model's context. Throws TokenizerError.
std::vector<std::vector<int32_t>> calibration_pieces(const Model& model,
                                                     std::span<const Prompt> texts,
                                                     int64_t max_tokens);

// 16 hex digits.
std::string calibration_text_hash(std::span<const std::vector<int32_t>> pieces);

}  // namespace mustafar
