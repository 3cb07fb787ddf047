#include "text/jinja/text.h"

#include <algorithm>
#include <cstdio>
#include <optional>
#include <utility>

#include "text/jinja/errors.h"
#include "text/unicode/properties.h"
#include "text/unicode/utf8.h"

namespace mustafar::jinja {

void Text::append(std::string_view s, bool outside) {
  if (outside && marks.empty()) marks.assign(bytes.size(), 0);
  if (!marks.empty() || outside) marks.append(s.size(), outside ? 1 : 0);
  bytes.append(s);
}

void Text::append(const Text& other, size_t begin, size_t end) {
  if (!other.marks.empty()) {
    if (marks.empty()) marks.assign(bytes.size(), 0);
    marks.append(other.marks, begin, end - begin);
  } else if (!marks.empty()) {
    marks.append(end - begin, 0);
  }
  bytes.append(other.bytes, begin, end - begin);
}

void Text::pad(size_t count, std::string_view fill) {
  for (size_t i = 0; i < count; i++) append(fill);
}

Text Text::sub(size_t begin, size_t end) const {
  Text out;
  out.append(*this, begin, end);
  out.markup = markup;
  return out;
}

namespace {

constexpr char32_t kCapitalSigma = 0x3A3, kSmallSigma = 0x3C3, kFinalSigma = 0x3C2;

// Whether a capital sigma at [at, after) ends a word, as str.lower decides.
bool is_final_sigma(const std::string& s, size_t at, size_t after) {
  bool cased_before = false;
  while (at > 0 && !cased_before) {
    at = unicode::previous_boundary(s, at);
    size_t next = at;
    const char32_t c = unicode::next_code_point(s, &next);
    if (unicode::is_case_ignorable(c)) continue;
    if (!unicode::is_cased(c)) return false;
    cased_before = true;
  }
  if (!cased_before) return false;
  while (after < s.size()) {
    const char32_t c = unicode::next_code_point(s, &after);
    if (!unicode::is_case_ignorable(c)) return !unicode::is_cased(c);
  }
  return true;
}

// Maps every character as choose(code point) says: a CaseMap, or nothing to keep it.
template <typename Choose>
Text map_characters(const Text& text, Choose choose) {
  Text out;
  out.markup = text.markup;
  for (size_t i = 0; i < text.size();) {
    const size_t at = i;
    const char32_t c = unicode::next_code_point(text.bytes, &i);
    const std::optional<CaseMap> map = choose(c);
    std::string mapped;
    if (!map) {
      unicode::append_utf8(c, &mapped);
    } else if (c == kCapitalSigma && *map == CaseMap::kLower) {
      unicode::append_utf8(is_final_sigma(text.bytes, at, i) ? kFinalSigma : kSmallSigma, &mapped);
    } else {
      unicode::append_case(c, *map, &mapped);
    }
    out.append(mapped, text.outside(at));
  }
  return out;
}

}  // namespace

Text map_case(const Text& text, CaseMap map) {
  return map_characters(text, [&](char32_t) { return map; });
}

Text title_case(const Text& text) {
  bool in_word = false;
  return map_characters(text, [&](char32_t c) {
    const CaseMap map = in_word ? CaseMap::kLower : CaseMap::kTitle;
    in_word = unicode::is_cased(c);
    return map;
  });
}

Text capitalize(const Text& text) {
  bool first = true;
  return map_characters(text, [&](char32_t) {
    return std::exchange(first, false) ? CaseMap::kTitle : CaseMap::kLower;
  });
}

Text swap_case(const Text& text) {
  return map_characters(text, [](char32_t c) -> std::optional<CaseMap> {
    if (unicode::is_upper(c)) return CaseMap::kLower;
    if (unicode::is_lower(c)) return CaseMap::kUpper;
    return std::nullopt;
  });
}

Text strip(const Text& text, const std::string* chars, bool left, bool right) {
  const auto drop = [&](size_t begin, size_t end) {
    if (chars) {
      const std::string_view c(text.bytes.data() + begin, end - begin);
      for (size_t i = 0; i < chars->size();) {
        const size_t at = i;
        unicode::next_code_point(*chars, &i);
        if (std::string_view(*chars).substr(at, i - at) == c) return true;
      }
      return false;
    }
    size_t at = begin;
    return unicode::is_space(unicode::next_code_point(text.bytes, &at));
  };
  size_t begin = 0, end = text.size();
  while (left && begin < end) {
    size_t next = begin;
    unicode::next_code_point(text.bytes, &next);
    if (!drop(begin, next)) break;
    begin = next;
  }
  while (right && end > begin) {
    const size_t start = unicode::previous_boundary(text.bytes, end);
    if (!drop(start, end)) break;
    end = start;
  }
  return text.sub(begin, end);
}

Text replace(const Text& text, const Text& from, const Text& to, int64_t count, size_t max_bytes) {
  Text out;
  out.markup = text.markup;
  size_t at = 0;
  const auto check = [&] {
    if (out.size() > max_bytes) fail("text grows beyond ", max_bytes, " bytes");
  };
  if (from.empty()) {
    for (; count != 0; count--) {
      out.append(to);
      check();
      if (at == text.size()) return out;
      const size_t begin = at;
      unicode::next_code_point(text.bytes, &at);
      out.append(text, begin, at);
    }
  }
  for (; count != 0 && !from.empty(); count--) {
    const size_t found = text.bytes.find(from.bytes, at);
    if (found == std::string::npos) break;
    out.append(text, at, found);
    out.append(to);
    check();
    at = found + from.size();
  }
  out.append(text, at, text.size());
  return out;
}

std::vector<Text> split_lines(const Text& text, bool keep_ends) {
  std::vector<Text> lines;
  size_t begin = 0;
  for (size_t i = 0; i < text.size();) {
    const size_t at = i;
    const char32_t c = unicode::next_code_point(text.bytes, &i);
    if (!unicode::is_line_break(c)) continue;
    if (c == '\r' && i < text.size() && text.bytes[i] == '\n') i++;
    lines.push_back(text.sub(begin, keep_ends ? i : at));
    begin = i;
  }
  if (begin < text.size()) lines.push_back(text.sub(begin, text.size()));
  return lines;
}

namespace {

std::vector<Text> split_whitespace(const Text& text, int64_t max, bool from_right) {
  // [begin, end) of every word.
  std::vector<std::pair<size_t, size_t>> words;
  bool in_word = false;
  for (size_t i = 0; i < text.size();) {
    const size_t at = i;
    const bool space = unicode::is_space(unicode::next_code_point(text.bytes, &i));
    if (!space && !in_word) words.emplace_back(at, i);
    if (!space) words.back().second = i;
    in_word = !space;
  }
  std::vector<Text> out;
  const size_t limit = max < 0 ? words.size() : static_cast<size_t>(max);
  if (words.size() <= limit) {
    for (auto [begin, end] : words) out.push_back(text.sub(begin, end));
  } else if (!from_right) {
    for (size_t i = 0; i < limit; i++) out.push_back(text.sub(words[i].first, words[i].second));
    out.push_back(text.sub(words[limit].first, text.size()));
  } else {
    const size_t first = words.size() - limit;
    out.push_back(text.sub(0, words[first - 1].second));
    for (size_t i = first; i < words.size(); i++) {
      out.push_back(text.sub(words[i].first, words[i].second));
    }
  }
  return out;
}

}  // namespace

std::vector<Text> split(const Text& text, const std::string* separator, int64_t max,
                        bool from_right) {
  if (!separator) return split_whitespace(text, max, from_right);
  std::vector<std::pair<size_t, size_t>> pieces;
  if (!from_right) {
    size_t begin = 0;
    for (; max != 0; max--) {
      const size_t found = text.bytes.find(*separator, begin);
      if (found == std::string::npos) break;
      pieces.emplace_back(begin, found);
      begin = found + separator->size();
    }
    pieces.emplace_back(begin, text.size());
  } else {
    size_t end = text.size();
    for (; max != 0 && end >= separator->size(); max--) {
      const size_t found = text.bytes.rfind(*separator, end - separator->size());
      if (found == std::string::npos) break;
      pieces.emplace_back(found + separator->size(), end);
      end = found;
    }
    pieces.emplace_back(0, end);
    std::reverse(pieces.begin(), pieces.end());
  }
  std::vector<Text> out;
  for (auto [begin, end] : pieces) out.push_back(text.sub(begin, end));
  return out;
}

Text escape_html(const Text& text) {
  Text out;
  out.markup = true;
  for (size_t i = 0; i < text.size(); i++) {
    const char c = text.bytes[i];
    const char* entity = c == '&'    ? "&amp;"
                         : c == '<'  ? "&lt;"
                         : c == '>'  ? "&gt;"
                         : c == '"'  ? "&#34;"
                         : c == '\'' ? "&#39;"
                                     : nullptr;
    if (entity) {
      out.append(entity, text.outside(i));
    } else {
      out.append(text, i, i + 1);
    }
  }
  return out;
}

std::string escape_character(char32_t c) {
  char escape[12];
  const char* form = c < 0x100 ? "\\x%02x" : c < 0x10000 ? "\\u%04x" : "\\U%08x";
  std::snprintf(escape, sizeof(escape), form, static_cast<unsigned>(c));
  return escape;
}

}  // namespace mustafar::jinja
