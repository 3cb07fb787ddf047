#include "text/jinja/unicode.h"

#include <algorithm>

#include "text/jinja/unicode_data.h"

namespace mustafar::jinja {
namespace {

bool in_ranges(const CodeRange* ranges, size_t count, uint32_t c) {
  const CodeRange* end = ranges + count;
  const CodeRange* at =
      std::lower_bound(ranges, end, c, [](const CodeRange& r, uint32_t v) { return r.last < v; });
  return at != end && at->first <= c;
}

struct CaseTable {
  const CaseRun* runs;
  size_t run_count;
  const CaseSpecial* specials;
  size_t special_count;
};

CaseTable table_of(CaseMap map) {
  switch (map) {
    case CaseMap::kUpper:
      return {kToUpper, kToUpperCount, kToUpperSpecial, kToUpperSpecialCount};
    case CaseMap::kLower:
      return {kToLower, kToLowerCount, kToLowerSpecial, kToLowerSpecialCount};
    default:
      return {kToTitle, kToTitleCount, kToTitleSpecial, kToTitleSpecialCount};
  }
}

}  // namespace

uint32_t next_code_point(std::string_view s, size_t* at) {
  const auto byte = [&](size_t i) { return static_cast<uint32_t>(static_cast<uint8_t>(s[i])); };
  const uint32_t lead = byte(*at);
  size_t length = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
  length = std::min(length, s.size() - *at);
  uint32_t code = length == 1 ? lead : lead & (0x7f >> length);
  for (size_t i = 1; i < length; i++) code = code << 6 | (byte(*at + i) & 0x3f);
  *at += length;
  return code;
}

void append_code_point(std::string* out, uint32_t c) {
  if (c < 0x80) {
    out->push_back(static_cast<char>(c));
  } else if (c < 0x800) {
    out->push_back(static_cast<char>(0xc0 | c >> 6));
    out->push_back(static_cast<char>(0x80 | (c & 0x3f)));
  } else if (c < 0x10000) {
    out->push_back(static_cast<char>(0xe0 | c >> 12));
    out->push_back(static_cast<char>(0x80 | (c >> 6 & 0x3f)));
    out->push_back(static_cast<char>(0x80 | (c & 0x3f)));
  } else {
    out->push_back(static_cast<char>(0xf0 | c >> 18));
    out->push_back(static_cast<char>(0x80 | (c >> 12 & 0x3f)));
    out->push_back(static_cast<char>(0x80 | (c >> 6 & 0x3f)));
    out->push_back(static_cast<char>(0x80 | (c & 0x3f)));
  }
}

bool is_valid_utf8(std::string_view s) {
  size_t i = 0;
  while (i < s.size()) {
    const uint8_t lead = static_cast<uint8_t>(s[i]);
    if (lead < 0x80) {
      i++;
      continue;
    }
    const size_t length = lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
    if (length == 0 || i + length > s.size()) return false;
    for (size_t k = 1; k < length; k++) {
      if ((static_cast<uint8_t>(s[i + k]) & 0xc0) != 0x80) return false;
    }
    size_t at = i;
    const uint32_t code = next_code_point(s, &at);
    const uint32_t least = length == 2 ? 0x80 : length == 3 ? 0x800 : 0x10000;
    if (code < least || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return false;
    i += length;
  }
  return true;
}

size_t count_code_points(std::string_view s) {
  return static_cast<size_t>(
      std::count_if(s.begin(), s.end(), [](char c) { return (c & 0xc0) != 0x80; }));
}

bool is_space(uint32_t c) {
  return (c >= 9 && c <= 13) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
         c == 0x3000;
}

bool is_line_break(uint32_t c) {
  return (c >= 10 && c <= 13) || (c >= 0x1c && c <= 0x1e) || c == 0x85 || c == 0x2028 ||
         c == 0x2029;
}

bool is_alpha(uint32_t c) { return in_ranges(kAlpha, kAlphaCount, c); }
bool is_decimal(uint32_t c) { return in_ranges(kDecimal, kDecimalCount, c); }
bool is_digit(uint32_t c) { return in_ranges(kDigit, kDigitCount, c); }
bool is_numeric(uint32_t c) { return in_ranges(kNumeric, kNumericCount, c); }
bool is_alnum(uint32_t c) { return is_alpha(c) || is_decimal(c) || is_digit(c) || is_numeric(c); }
bool is_upper(uint32_t c) { return in_ranges(kUpper, kUpperCount, c); }
bool is_lower(uint32_t c) { return in_ranges(kLower, kLowerCount, c); }
bool is_title(uint32_t c) { return in_ranges(kTitle, kTitleCount, c); }
bool is_printable(uint32_t c) { return in_ranges(kPrintable, kPrintableCount, c); }
bool is_cased(uint32_t c) { return in_ranges(kCased, kCasedCount, c); }
bool is_case_ignorable(uint32_t c) { return in_ranges(kIgnorable, kIgnorableCount, c); }

void append_case(std::string* out, uint32_t c, CaseMap map) {
  const CaseTable table = table_of(map);
  const CaseSpecial* specials_end = table.specials + table.special_count;
  const CaseSpecial* special = std::lower_bound(
      table.specials, specials_end, c, [](const CaseSpecial& s, uint32_t v) { return s.code < v; });
  if (special != specials_end && special->code == c) {
    for (uint32_t mapped : special->mapped) {
      if (mapped) append_code_point(out, mapped);
    }
    return;
  }
  const CaseRun* runs_end = table.runs + table.run_count;
  const CaseRun* run = std::lower_bound(table.runs, runs_end, c,
                                        [](const CaseRun& r, uint32_t v) { return r.last < v; });
  if (run != runs_end && run->first <= c && (c - run->first) % run->stride == 0) {
    c = static_cast<uint32_t>(static_cast<int32_t>(c) + run->delta);
  }
  append_code_point(out, c);
}

}  // namespace mustafar::jinja
