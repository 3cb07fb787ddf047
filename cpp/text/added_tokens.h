// Tokens that are matched in the text itself, before anything else: special tokens and other
// additions to the model's vocabulary.
#pragma once

#include <bitset>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "mustafar/text_range.h"
#include "text/flat_map.h"
#include "text/json_field.h"
#include "text/normalizer.h"
#include "text/vocab.h"

namespace mustafar::text {

struct AddedToken {
  int32_t id;
  std::string content;
  bool special;
  bool normalized;   // matched in the normalized text, as its content is normalized
  bool lstrip;       // takes the white space before it along
  bool rstrip;       // and that after it
  bool single_word;  // only where no word character adjoins it
};

class AddedTokens {
 public:
  AddedTokens() = default;
  // field: the array added_tokens, or null.
  static AddedTokens parse(const JsonField& field);

  // Checks the ids against the vocabulary and builds the look-ups. file: for messages.
  void prepare(const Vocab& vocab, const Normalizer& normalizer, const std::string& file);

  int64_t max_id() const;  // -1 where there is none
  size_t size() const { return tokens_.size(); }
  const AddedToken* find(int32_t id) const;
  std::optional<int32_t> find(std::string_view content) const;

  // A part of a text: a token, or text to be encoded where id is -1. Never an empty text.
  struct Piece {
    uint32_t begin, end;
    int32_t id;
  };
  // Splits raw text (normalized false) or the normalized pieces between its tokens. parse_special:
  // special tokens count; otherwise they are text.
  void split(std::string_view text, bool normalized, bool parse_special,
             std::vector<Piece>* pieces) const;
  // Splits a rendered chat: tokens in the raw text, special ones whether normalized or not, unless
  // they overlap one of the ascending ranges `outside`.
  void split_chat(std::string_view text, std::span<const TextRange> outside,
                  std::vector<Piece>* pieces) const;
  bool any(bool normalized) const { return tries_[normalized].terminals.size() > 1; }

 private:
  // Edges (node << 8 | byte) -> child; terminals[node] is an index into tokens_, or -1.
  struct Trie {
    PairMap edges;
    std::vector<int32_t> terminals{-1};
    std::bitset<256> first_bytes;

    void insert(std::string_view content, int32_t index);
    // The longest entry that starts at pos: its index and end.
    std::optional<std::pair<int32_t, size_t>> match(std::string_view text, size_t pos) const;
  };

  // counts(token, begin, end, &pos) tells whether a token that is spelled at [begin, end) is to be
  // one. If not, it sets pos to where the search goes on.
  template <typename Counts>
  void split_by(const Trie& trie, std::string_view text, const Counts& counts,
                std::vector<Piece>* pieces) const;

  std::vector<AddedToken> tokens_;
  std::unordered_map<int32_t, size_t> by_id_;
  std::unordered_map<std::string, size_t> by_content_;
  Trie tries_[2];   // [normalized]
  Trie chat_trie_;  // special tokens, and others that are matched in raw text
};

}  // namespace mustafar::text
