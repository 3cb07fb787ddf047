// tokenizer.json as read: vocabulary and merges, hundreds of thousands of strings, go to flat
// storage while the file is parsed; everything else is a small document.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "core/json_tree.h"
#include "text/flat_map.h"
#include "text/json_field.h"
#include "text/vocab.h"

namespace mustafar::text {

struct TokenizerJson {
  struct Token {
    uint32_t offset, length;  // in vocab_bytes
    uint32_t id;
  };
  struct Merge {
    uint32_t left_length, right_length;  // of parts that follow each other in merge_bytes
  };

  std::string file;  // for messages
  JsonTree<> root;   // without model.vocab and model.merges
  std::string vocab_bytes;
  std::vector<Token> vocab;  // in the file's order
  std::string merge_bytes;
  std::vector<Merge> merges;  // in order of rank
  bool has_vocab = false, has_merges = false;

  JsonField field() const { return JsonField(*root, file, ""); }
};

// Reads a tokenizer.json, or the one in a folder. Throws TokenizerError naming file and offset.
TokenizerJson read_tokenizer_json(const std::filesystem::path& path);
TokenizerJson parse_tokenizer_json(std::string_view text, std::string file);

// The model's vocabulary, with room for ids up to max_added_id as well.
Vocab build_vocab(const TokenizerJson& json, int64_t max_added_id, size_t added_count);

// (left id, right id) -> (rank, id of the two joined), and the keys in order of rank.
struct MergeTable {
  PairMap map;
  std::vector<uint64_t> pairs;
};
MergeTable build_merges(const TokenizerJson& json, const Vocab& vocab);

}  // namespace mustafar::text
