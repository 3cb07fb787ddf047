// Finds stop texts in generated text that arrives token by token, wherever the token boundaries
// fall.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace mustafar {

// The match that counts is the one that is complete first (of those the longest), byte by byte, so
// that the outcome does not depend on how the text was cut into tokens.
class StopMatcher {
 public:
  // sees_hidden: for each stop text whether hidden text counts for it; or empty: for none. Throws
  // std::invalid_argument for an empty stop text.
  explicit StopMatcher(const std::vector<std::string>& stops,
                       const std::vector<bool>& sees_hidden = {});

  // Takes a token's text (possibly empty: part of a character, or a skipped special token) and
  // returns what is now certain not to belong to a stop text. Once matched, returns nothing more.
  // is_token false: text without a token of its own (what a decoder held back at the end).
  std::string push(std::string_view piece, bool is_token = true);
  // Text that is no part of the output, such as a special token's, at the end of what was pushed.
  // Returns what became certain, as push() does.
  std::string push_hidden(std::string_view piece);
  bool sees_hidden() const { return sees_hidden_; }  // any stop text
  // At the end without a match: the text that was held back.
  std::string flush();

  bool matched() const { return matched_; }
  // After a match: the tokens whose text lies wholly before the stop text. A token without text
  // belongs to the text that follows it. Without a match: all tokens pushed.
  int64_t kept_tokens() const;
  // After a match: the end of the text returned that kept_tokens() does not cover, because its
  // token runs on into the stop text; usually empty.
  const std::string& remainder() const { return remainder_; }

 private:
  struct Stop {
    std::string text;
    std::vector<int32_t> failure;  // [i]: longest border of text[0, i), i >= 1 (Knuth-Morris-Pratt)
    int32_t state = 0;             // bytes of text that the pushed text ends with
    bool sees_hidden = false;
    std::vector<bool> hidden;  // of those bytes, which are hidden; where sees_hidden

    // Takes the next byte of the text.
    void take(char byte, bool is_hidden);
    int64_t visible() const;  // bytes of the output that `state` covers
    bool complete() const { return state == static_cast<int32_t>(text.size()); }
  };

  // Notes whether the last byte taken, behind the output's first `end` bytes, completed a stop.
  void find_match(int64_t end);
  // After bytes were taken: returns the text that became certain.
  std::string advance();
  // Drops tokens that can't be cut any more, and their text.
  void settle();

  std::vector<Stop> stops_;
  bool sees_hidden_ = false;
  // Offsets are bytes into the whole text.
  std::string recent_;         // text of the tokens that may still be cut
  int64_t recent_begin_ = 0;   // offset of recent_
  int64_t certain_ = 0;        // end of the text returned
  std::vector<int64_t> ends_;  // of the tokens that may still be cut; -1: no text of its own yet
  int64_t settled_tokens_ = 0;
  bool matched_ = false;
  int64_t match_begin_ = 0;  // where matched
  int64_t kept_tokens_ = 0;
  std::string remainder_;
};

}  // namespace mustafar
