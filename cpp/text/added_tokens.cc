#include "text/added_tokens.h"

#include <algorithm>

#include "text/unicode/properties.h"
#include "text/unicode/utf8.h"

namespace mustafar::text {

namespace {

constexpr size_t kMaxContentBytes = 1024;  // bounds the work per byte of text

bool ends_with_word(std::string_view text) {
  if (text.empty()) return false;
  size_t pos = unicode::previous_boundary(text, text.size());
  return unicode::is_word_character(unicode::next_code_point(text, &pos));
}

bool starts_with_word(std::string_view text) {
  if (text.empty()) return false;
  size_t pos = 0;
  return unicode::is_word_character(unicode::next_code_point(text, &pos));
}

// Start of the white space that ends the text.
size_t trailing_space(std::string_view text) {
  size_t end = text.size();
  while (end > 0) {
    const size_t start = unicode::previous_boundary(text, end);
    size_t pos = start;
    if (!unicode::is_white_space(unicode::next_code_point(text, &pos))) break;
    end = start;
  }
  return end;
}

// End of the white space that starts the text.
size_t leading_space(std::string_view text) {
  size_t end = 0;
  while (end < text.size()) {
    size_t pos = end;
    if (!unicode::is_white_space(unicode::next_code_point(text, &pos))) break;
    end = pos;
  }
  return end;
}

}  // namespace

AddedTokens AddedTokens::parse(const JsonField& field) {
  AddedTokens added;
  if (field.is_null()) return added;
  for (const JsonField& entry : field.elements()) {
    AddedToken token{};
    const int64_t id = entry.at("id").integer();
    if (id < 0 || id > 1 << 24) {
      entry.at("id").fail("must be from 0 to " + std::to_string(1 << 24) + ", found " +
                          std::to_string(id));
    }
    token.id = static_cast<int32_t>(id);
    token.content = entry.at("content").string();
    if (token.content.empty() || token.content.size() > kMaxContentBytes) {
      entry.at("content").fail("must have 1 to " + std::to_string(kMaxContentBytes) +
                               " bytes, found " + std::to_string(token.content.size()));
    }
    token.special = entry.boolean_or("special", false);
    token.normalized = entry.boolean_or("normalized", !token.special);
    token.lstrip = entry.boolean_or("lstrip", false);
    token.rstrip = entry.boolean_or("rstrip", false);
    token.single_word = entry.boolean_or("single_word", false);
    const size_t index = added.tokens_.size();
    const auto same_id = added.by_id_.find(token.id);
    if (same_id != added.by_id_.end() && added.tokens_[same_id->second].content != token.content) {
      entry.fail("id " + std::to_string(id) + " is given to " +
                 unicode::in_quotes(added.tokens_[same_id->second].content) + " and to " +
                 unicode::in_quotes(token.content));
    }
    const auto same_content = added.by_content_.find(token.content);
    if (same_content != added.by_content_.end() &&
        added.tokens_[same_content->second].id != token.id) {
      entry.fail(unicode::in_quotes(token.content) + " has the ids " +
                 std::to_string(added.tokens_[same_content->second].id) + " and " +
                 std::to_string(id));
    }
    if (same_id != added.by_id_.end()) {
      added.tokens_[same_id->second] = std::move(token);
      continue;
    }
    added.by_id_[token.id] = index;
    added.by_content_[token.content] = index;
    added.tokens_.push_back(std::move(token));
  }
  return added;
}

int64_t AddedTokens::max_id() const {
  int64_t max = -1;
  for (const AddedToken& token : tokens_) max = std::max<int64_t>(max, token.id);
  return max;
}

const AddedToken* AddedTokens::find(int32_t id) const {
  const auto it = by_id_.find(id);
  return it == by_id_.end() ? nullptr : &tokens_[it->second];
}

std::optional<int32_t> AddedTokens::find(std::string_view content) const {
  const auto it = by_content_.find(std::string(content));
  if (it == by_content_.end()) return std::nullopt;
  return tokens_[it->second].id;
}

void AddedTokens::prepare(const Vocab& vocab, const Normalizer& normalizer,
                          const std::string& file) {
  MatchScratch scratch;
  // Where two normalize to the same text the first counts, special tokens before others.
  for (const bool special : {true, false}) {
    for (size_t i = 0; i < tokens_.size(); i++) {
      const AddedToken& token = tokens_[i];
      if (token.special != special) continue;
      const auto vocab_id = vocab.find(token.content);
      const std::string name = file + ": added_tokens: " + unicode::in_quotes(token.content) +
                               " has id " + std::to_string(token.id);
      if (vocab_id && *vocab_id != token.id) {
        throw TokenizerError(name + ", but " + std::to_string(*vocab_id) + " in model.vocab");
      }
      if (!vocab_id && vocab.contains(token.id)) {
        throw TokenizerError(name + ", which is " + unicode::in_quotes(vocab.token(token.id)) +
                             " in model.vocab");
      }
      tries_[token.normalized].insert(
          token.normalized ? normalizer.apply(token.content, &scratch) : token.content,
          static_cast<int32_t>(i));
      if (token.special || !token.normalized)
        chat_trie_.insert(token.content, static_cast<int32_t>(i));
    }
  }
}

void AddedTokens::Trie::insert(std::string_view content, int32_t index) {
  if (content.empty()) return;
  first_bytes.set(static_cast<unsigned char>(content[0]));
  uint64_t node = 0;
  for (const char c : content) {
    const uint64_t key = node << 8 | static_cast<unsigned char>(c);
    if (const PairMap::Value* child = edges.find(key)) {
      node = child->first;
      continue;
    }
    node = terminals.size();
    edges.set(key, {static_cast<uint32_t>(node), 0});
    terminals.push_back(-1);
  }
  if (terminals[node] < 0) terminals[node] = index;
}

std::optional<std::pair<int32_t, size_t>> AddedTokens::Trie::match(std::string_view text,
                                                                   size_t pos) const {
  std::optional<std::pair<int32_t, size_t>> longest;
  uint64_t node = 0;
  while (pos < text.size()) {
    const PairMap::Value* child = edges.find(node << 8 | static_cast<unsigned char>(text[pos]));
    if (!child) break;
    node = child->first;
    pos++;
    if (terminals[node] >= 0) longest = {terminals[node], pos};
  }
  return longest;
}

template <typename Counts>
void AddedTokens::split_by(const Trie& trie, std::string_view text, const Counts& counts,
                           std::vector<Piece>* pieces) const {
  pieces->clear();
  size_t covered = 0;  // end of the last token with the space that it took along
  const auto push = [&](size_t begin, size_t end, int32_t id) {
    pieces->push_back({static_cast<uint32_t>(begin), static_cast<uint32_t>(end), id});
  };
  for (size_t pos = 0; pos < text.size();) {
    const auto found = trie.first_bytes[static_cast<unsigned char>(text[pos])]
                           ? trie.match(text, pos)
                           : std::nullopt;
    if (!found) {
      pos++;
      continue;
    }
    const AddedToken& token = tokens_[found->first];
    size_t begin = pos;
    size_t end = found->second;
    if (!counts(token, begin, end, &pos)) continue;
    pos = end;
    if (token.single_word &&
        (ends_with_word(text.substr(0, begin)) || starts_with_word(text.substr(end)))) {
      continue;
    }
    if (token.lstrip) begin = std::max(trailing_space(text.substr(0, begin)), covered);
    if (token.rstrip) end += leading_space(text.substr(end));
    if (covered < begin) push(covered, begin, -1);
    push(begin, end, token.id);
    covered = end;
  }
  if (covered < text.size()) push(covered, text.size(), -1);
}

void AddedTokens::split(std::string_view text, bool normalized, bool parse_special,
                        std::vector<Piece>* pieces) const {
  const auto counts = [&](const AddedToken& token, size_t, size_t end, size_t* pos) {
    if (!token.special || parse_special) return true;
    *pos = end;  // what is found but does not count still hides what overlaps it
    return false;
  };
  split_by(tries_[normalized], text, counts, pieces);
}

void AddedTokens::split_chat(std::string_view text, std::span<const TextRange> outside,
                             std::vector<Piece>* pieces) const {
  size_t next = 0;  // the first range that ends behind the position
  const auto counts = [&](const AddedToken& token, size_t begin, size_t end, size_t* pos) {
    while (next < outside.size() && outside[next].end <= begin) next++;
    const bool overlaps = next < outside.size() && outside[next].begin < end;
    if (!token.special || !overlaps) return true;
    *pos = begin + 1;  // a user's text must not hide a token of the template
    return false;
  };
  split_by(chat_trie_, text, counts, pieces);
}

}  // namespace mustafar::text
