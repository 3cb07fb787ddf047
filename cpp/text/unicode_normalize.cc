#include "text/unicode_normalize.h"

#include <algorithm>
#include <span>
#include <vector>

#include "text/unicode_tables.h"
#include "text/utf8.h"

namespace mustafar::text {

namespace {

// Hangul syllables are composed by arithmetic (The Unicode Standard, section 3.12).
constexpr char32_t kSyllables = 0xAC00, kLeads = 0x1100, kVowels = 0x1161, kTails = 0x11A7;
constexpr char32_t kLeadCount = 19, kVowelCount = 21, kTailCount = 28;
constexpr char32_t kSyllableCount = kLeadCount * kVowelCount * kTailCount;

// A code point with its canonical combining class.
struct Scalar {
  char32_t code_point;
  int32_t combining_class;
};

const CodePointRange* find_range(std::span<const CodePointRange> table, char32_t c) {
  const auto it = std::upper_bound(
      table.begin(), table.end(), c,
      [](char32_t value, const CodePointRange& range) { return value < range.first; });
  if (it == table.begin() || c > std::prev(it)->last) return nullptr;
  return &*std::prev(it);
}

Scalar scalar(char32_t c) {
  if (c < 0x300) return {c, 0};
  const CodePointRange* range = find_range(kUnicodeTables.combining_classes, c);
  return {c, range ? range->value : 0};
}

bool append_listed(std::span<const Decomposition> table, char32_t c, std::vector<Scalar>* out) {
  const auto it = std::lower_bound(
      table.begin(), table.end(), c,
      [](const Decomposition& entry, char32_t value) { return entry.code_point < value; });
  if (it == table.end() || it->code_point != c) return false;
  for (const char32_t part : kUnicodeTables.pool.subspan(it->offset, it->length)) {
    out->push_back(scalar(part));
  }
  return true;
}

void append_decomposed(char32_t c, bool compatibility, std::vector<Scalar>* out) {
  if (c < 0x80) {
    out->push_back({c, 0});
  } else if (c - kSyllables < kSyllableCount) {
    const char32_t index = c - kSyllables;
    out->push_back({kLeads + index / (kVowelCount * kTailCount), 0});
    out->push_back({kVowels + index / kTailCount % kVowelCount, 0});
    if (index % kTailCount != 0) out->push_back({kTails + index % kTailCount, 0});
  } else if (!(compatibility && append_listed(kUnicodeTables.compatibility, c, out)) &&
             !append_listed(kUnicodeTables.canonical, c, out)) {
    out->push_back(scalar(c));
  }
}

// The character that two compose to, or 0.
char32_t compose_pair(char32_t first, char32_t second) {
  if (first - kLeads < kLeadCount && second - kVowels < kVowelCount) {
    return kSyllables + ((first - kLeads) * kVowelCount + (second - kVowels)) * kTailCount;
  }
  if (first - kSyllables < kSyllableCount && (first - kSyllables) % kTailCount == 0 &&
      second > kTails && second - kTails < kTailCount) {
    return first + (second - kTails);
  }
  const auto table = kUnicodeTables.compositions;
  const auto it = std::lower_bound(table.begin(), table.end(), std::pair(first, second),
                                   [](const Composition& entry, const auto& value) {
                                     return std::pair(entry.first, entry.second) < value;
                                   });
  return it != table.end() && it->first == first && it->second == second ? it->composed : 0;
}

// Runs of combining marks in the order of their classes.
void reorder(std::vector<Scalar>* scalars) {
  const auto end = scalars->end();
  for (auto it = scalars->begin(); it != end;) {
    if (it->combining_class == 0) {
      ++it;
      continue;
    }
    auto last = it;
    while (last != end && last->combining_class != 0) ++last;
    std::stable_sort(it, last, [](const Scalar& a, const Scalar& b) {
      return a.combining_class < b.combining_class;
    });
    it = last;
  }
}

void compose(std::vector<Scalar>* scalars) {
  size_t kept = 0;
  size_t starter = ~size_t{0};  // index of the last character of class 0, among those kept
  int32_t last_class = 0;       // of what was kept since the starter, 0 where that is nothing
  for (const Scalar s : *scalars) {
    if (starter != ~size_t{0} && (kept == starter + 1 || last_class < s.combining_class)) {
      // Not blocked: nothing of the same or a higher class stands between.
      if (const char32_t composed = compose_pair((*scalars)[starter].code_point, s.code_point)) {
        (*scalars)[starter].code_point = composed;
        continue;
      }
    }
    if (s.combining_class == 0) starter = kept;
    last_class = s.combining_class;
    (*scalars)[kept++] = s;
  }
  scalars->resize(kept);
}

std::span<const CodePointRange> unstable(NormalForm form) {
  switch (form) {
    case NormalForm::kNfc:
      return kUnicodeTables.unstable_nfc;
    case NormalForm::kNfd:
      return kUnicodeTables.unstable_nfd;
    case NormalForm::kNfkc:
      return kUnicodeTables.unstable_nfkc;
    case NormalForm::kNfkd:
      return kUnicodeTables.unstable_nfkd;
  }
  return {};
}

}  // namespace

std::string normalize_unicode(std::string_view text, NormalForm form) {
  if (is_ascii(text)) return std::string(text);
  const auto table = unstable(form);
  const bool compatibility = form == NormalForm::kNfkc || form == NormalForm::kNfkd;
  const bool composed = form == NormalForm::kNfc || form == NormalForm::kNfkc;

  // Stretches of stable characters are copied; each other one is handled from the character before
  // its first unstable one (which that may compose with) to its last.
  std::string out;
  out.reserve(text.size());
  std::vector<Scalar> scalars;
  size_t previous = 0;  // start of the character before pos, not yet copied
  for (size_t pos = 0; pos < text.size();) {
    const size_t start = pos;
    char32_t c = next_code_point(text, &pos);
    if (c < 0x80 || !find_range(table, c)) {
      out.append(text.substr(previous, start - previous));
      previous = start;
      continue;
    }
    scalars.clear();
    size_t i = previous;
    size_t end = pos;
    while (i < start) append_decomposed(next_code_point(text, &i), compatibility, &scalars);
    append_decomposed(c, compatibility, &scalars);
    for (i = pos; i < text.size();) {
      c = next_code_point(text, &i);
      if (c < 0x80 || !find_range(table, c)) break;
      append_decomposed(c, compatibility, &scalars);
      end = i;
    }
    reorder(&scalars);
    if (composed) compose(&scalars);
    for (const Scalar& s : scalars) append_utf8(s.code_point, &out);
    previous = pos = end;
  }
  return out.append(text.substr(previous));
}

std::string lower_case(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t pos = 0; pos < text.size();) {
    const char32_t c = next_code_point(text, &pos);
    if (c == 0x130) {
      out += "i\xCC\x87";  // the one character whose lower case is two
    } else if (const CodePointRange* range = find_range(kUnicodeTables.lower, c)) {
      append_utf8(c + range->value, &out);
    } else {
      append_utf8(c, &out);
    }
  }
  return out;
}

bool is_word_character(char32_t c) { return find_range(kUnicodeTables.word, c) != nullptr; }

}  // namespace mustafar::text
