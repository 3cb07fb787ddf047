// Tokens that files beside tokenizer.json add to it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "text/tokenizer_json.h"

namespace mustafar::text {

// The names under which the files of a folder have its special tokens.
inline constexpr const char* kSpecialTokenNames[] = {
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"};

// What the files of a folder say of the ends of a text, the tokenizer's before the model's.
struct FolderEnds {
  std::vector<std::string> bos_tokens, eos_tokens;  // as spelled
  std::vector<int64_t> bos_ids, eos_ids;
};

// Files that can't be read say nothing.
FolderEnds read_ends(const std::filesystem::path& folder);

// Adds to added_tokens of a folder's tokenizer.json what transformers adds on loading: the tokens
// of added_tokens_decoder in tokenizer_config.json, else those of added_tokens.json, and the
// special tokens that tokenizer_config.json and special_tokens_map.json name. A token of the
// vocabulary keeps its id, another one gets the next id that is free. Throws TokenizerError naming
// the file.
void add_tokens_of_folder(const std::filesystem::path& folder, TokenizerJson* json);

}  // namespace mustafar::text
