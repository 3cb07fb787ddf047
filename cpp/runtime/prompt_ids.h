// Token ids of what a caller gives.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "mustafar/tokenizer.h"

namespace mustafar {

// Ids of a prompt as a generation at this position takes them: BOS only at position 0.
// parse_special: of a text, as Tokenizer::encode has it. Throws TokenizerError for a text where
// tokenizer is null.
std::vector<int32_t> prompt_ids(const std::variant<std::string, std::vector<int32_t>>& prompt,
                                const Tokenizer* tokenizer, int64_t position, bool parse_special);

// Throws std::invalid_argument naming the first id that is not in [0, vocab_size); where: what the
// message begins with.
void check_token_ids(std::span<const int32_t> ids, int64_t vocab_size,
                     const std::string& where = {});

}  // namespace mustafar
