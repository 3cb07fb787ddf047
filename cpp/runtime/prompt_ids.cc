#include "runtime/prompt_ids.h"

#include <stdexcept>

#include "mustafar/error.h"

namespace mustafar {

std::vector<int32_t> prompt_ids(const std::variant<std::string, std::vector<int32_t>>& prompt,
                                const Tokenizer* tokenizer, int64_t position, bool parse_special) {
  if (const auto* ids = std::get_if<std::vector<int32_t>>(&prompt)) return *ids;
  if (tokenizer == nullptr) {
    throw TokenizerError("the model folder has no tokenizer.json: pass token ids instead of text");
  }
  return tokenizer->encode(std::get<std::string>(prompt), /*add_special=*/position == 0,
                           parse_special);
}

void check_token_ids(std::span<const int32_t> ids, int64_t vocab_size, const std::string& where) {
  for (size_t i = 0; i < ids.size(); i++) {
    if (ids[i] >= 0 && ids[i] < vocab_size) continue;
    throw std::invalid_argument(where + "token id " + std::to_string(ids[i]) + " at index " +
                                std::to_string(i) + " is outside the vocabulary of " +
                                std::to_string(vocab_size));
  }
}

}  // namespace mustafar
