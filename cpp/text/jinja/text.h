// Text that remembers which of its bytes came from outside the template.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text/unicode/case_mapping.h"

namespace mustafar::jinja {

// Valid UTF-8. Every operation of the engine that makes text carries the marks along, so that in
// the end a special token spelled by a user is told from one that the template wrote.
struct Text {
  std::string bytes;
  std::string marks;    // empty: all from the template; else one char per byte, 1: from outside
  bool markup = false;  // HTML-escaped, as markupsafe.Markup

  Text() = default;
  explicit Text(std::string_view s, bool outside = false)
      : bytes(s), marks(outside ? std::string(s.size(), 1) : std::string()) {}

  size_t size() const { return bytes.size(); }
  bool empty() const { return bytes.empty(); }
  bool outside(size_t at) const { return !marks.empty() && marks[at]; }

  void append(std::string_view s, bool outside = false);
  void append(const Text& other) { append(other, 0, other.size()); }
  void append(const Text& other, size_t begin, size_t end);  // bytes [begin, end) of other
  void pad(size_t count, std::string_view fill = " ");       // fill, count times
  Text sub(size_t begin, size_t end) const;
};

using unicode::CaseMap;

Text map_case(const Text& text, CaseMap map);
Text title_case(const Text& text);  // str.title
Text capitalize(const Text& text);  // str.capitalize
Text swap_case(const Text& text);   // str.swapcase
// Strips whitespace, or the characters of `chars` where given, from the sides asked for.
Text strip(const Text& text, const std::string* chars, bool left, bool right);
// count < 0: all.
Text replace(const Text& text, const Text& from, const Text& to, int64_t count, size_t max_bytes);
std::vector<Text> split_lines(const Text& text, bool keep_ends = false);
// separator null: runs of whitespace. max < 0: no limit. from_right: as rsplit.
std::vector<Text> split(const Text& text, const std::string* separator, int64_t max,
                        bool from_right);
Text escape_html(const Text& text);
// \xHH, \uHHHH or \UHHHHHHHH, as Python writes a character that it cannot show.
std::string escape_character(char32_t c);

}  // namespace mustafar::jinja
