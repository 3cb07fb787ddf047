#include "text/jinja/text.h"

#include <algorithm>
#include <stdexcept>

#include "text/jinja/errors.h"

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

void Text::append_code_point(uint32_t c, bool outside) {
  std::string s;
  jinja::append_code_point(&s, c);
  append(s, outside);
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

std::vector<size_t> code_point_offsets(std::string_view s) {
  std::vector<size_t> offsets;
  offsets.reserve(s.size() + 1);
  for (size_t i = 0; i < s.size(); i++) {
    if ((s[i] & 0xc0) != 0x80) offsets.push_back(i);
  }
  offsets.push_back(s.size());
  return offsets;
}

namespace {

// Whether a capital sigma at [at, after) ends a word, as str.lower decides.
bool is_final_sigma(const std::string& s, size_t at, size_t after) {
  bool cased_before = false;
  for (size_t i = at; i > 0;) {
    size_t start = i - 1;
    while (start > 0 && (s[start] & 0xc0) == 0x80) start--;
    size_t k = start;
    const uint32_t c = next_code_point(s, &k);
    i = start;
    if (is_case_ignorable(c)) continue;
    cased_before = is_cased(c);
    break;
  }
  if (!cased_before) return false;
  for (size_t i = after; i < s.size();) {
    const uint32_t c = next_code_point(s, &i);
    if (is_case_ignorable(c)) continue;
    return !is_cased(c);
  }
  return true;
}

// Applies choose(code point, byte offset) -> CaseMap or -1 (keep) to every character.
template <typename Choose>
Text map_characters(const Text& text, Choose choose) {
  Text out;
  out.markup = text.markup;
  for (size_t i = 0; i < text.size();) {
    const size_t at = i;
    const uint32_t c = next_code_point(text.bytes, &i);
    const int map = choose(c);
    std::string mapped;
    if (map < 0) {
      append_code_point(&mapped, c);
    } else if (c == 0x3a3 && map == static_cast<int>(CaseMap::kLower)) {
      append_code_point(&mapped, is_final_sigma(text.bytes, at, i) ? 0x3c2 : 0x3c3);
    } else {
      append_case(&mapped, c, static_cast<CaseMap>(map));
    }
    out.append(mapped, text.outside(at));
  }
  return out;
}

constexpr int kToUpperCase = static_cast<int>(CaseMap::kUpper);
constexpr int kToLowerCase = static_cast<int>(CaseMap::kLower);
constexpr int kToTitleCase = static_cast<int>(CaseMap::kTitle);

}  // namespace

Text map_case(const Text& text, CaseMap map) {
  return map_characters(text, [&](uint32_t) { return static_cast<int>(map); });
}

Text title_case(const Text& text) {
  bool in_word = false;
  return map_characters(text, [&](uint32_t c) {
    const int map = in_word ? kToLowerCase : kToTitleCase;
    in_word = is_cased(c);
    return map;
  });
}

Text capitalize(const Text& text) {
  bool first = true;
  return map_characters(text, [&](uint32_t) {
    const int map = first ? kToTitleCase : kToLowerCase;
    first = false;
    return map;
  });
}

Text swap_case(const Text& text) {
  return map_characters(text, [](uint32_t c) {
    return is_upper(c) ? kToLowerCase : is_lower(c) ? kToUpperCase : -1;
  });
}

Text strip(const Text& text, const std::string* chars, bool left, bool right) {
  const auto drop = [&](size_t begin, size_t end) {
    if (chars) {
      const std::string_view c(text.bytes.data() + begin, end - begin);
      for (size_t i = 0; i < chars->size();) {
        const size_t at = i;
        next_code_point(*chars, &i);
        if (std::string_view(*chars).substr(at, i - at) == c) return true;
      }
      return false;
    }
    size_t at = begin;
    return is_space(next_code_point(text.bytes, &at));
  };
  size_t begin = 0, end = text.size();
  while (left && begin < end) {
    size_t next = begin;
    next_code_point(text.bytes, &next);
    if (!drop(begin, next)) break;
    begin = next;
  }
  while (right && end > begin) {
    size_t start = end - 1;
    while (start > begin && (text.bytes[start] & 0xc0) == 0x80) start--;
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
      next_code_point(text.bytes, &at);
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
    const uint32_t c = next_code_point(text.bytes, &i);
    if (!is_line_break(c)) continue;
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
    const bool space = is_space(next_code_point(text.bytes, &i));
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

}  // namespace mustafar::jinja
