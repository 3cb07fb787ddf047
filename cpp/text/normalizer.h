// The normalizer of tokenizer.json: what happens to a text before it is split.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "text/json_field.h"
#include "text/regex.h"
#include "text/unicode/normalize.h"

namespace mustafar::text {

// Longest text that is encoded in one call; offsets have 32 bits with room to grow in.
inline constexpr size_t kMaxTextBytes = size_t{1} << 29;

// A literal or a regular expression, as in {"String": ...} or {"Regex": ...}.
class Pattern {
 public:
  static Pattern parse(const JsonField& field);
  static Pattern of(Regex regex);
  static Pattern literal(std::string text);  // not empty

  // As Regex::find_parts.
  void find_parts(std::string_view text, MatchScratch* scratch, std::vector<Part>* parts) const;
  std::string replace(std::string_view text, std::string_view content, MatchScratch* scratch) const;

 private:
  std::string literal_;  // used where there is no regex
  std::optional<Regex> regex_;
};

class Normalizer {
 public:
  Normalizer() = default;
  // field: an object, or null for none. Throws TokenizerError, also for unsupported types.
  static Normalizer parse(const JsonField& field);

  bool empty() const { return steps_.empty(); }
  std::string apply(std::string_view text, MatchScratch* scratch) const;

 private:
  enum class Kind { kPrepend, kReplace, kForm, kLowercase, kStrip, kByteLevel };
  struct Step {
    Kind kind;
    std::string content;  // kPrepend, kReplace
    Pattern pattern;      // kReplace
    unicode::NormalForm form = unicode::NormalForm::kNfc;
    bool strip_left = false, strip_right = false;
  };
  void add(const JsonField& field);

  std::vector<Step> steps_;
};

}  // namespace mustafar::text
