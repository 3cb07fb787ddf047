#include "text/unicode/normalize.h"

#include <algorithm>
#include <span>
#include <vector>

#include "text/unicode/tables.h"
#include "text/unicode/utf8.h"

namespace mustafar::unicode {

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

constexpr char32_t kFirstCombining = 0x300;

Scalar scalar(char32_t c) {
  if (c < kFirstCombining) return {c, 0};
  const CombiningClassRange* range = find_range(kTokenizerTables.combining_classes, c);
  return {c, range ? range->combining_class : 0};
}

bool append_listed(std::span<const Decomposition> table, char32_t c, std::vector<Scalar>* out) {
  const Decomposition* entry = find_entry(table, c);
  if (!entry) return false;
  const auto pool = kTokenizerTables.decomposition_pool;
  for (const char32_t part : pool.subspan(entry->offset, entry->length)) {
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
  } else if (!(compatibility && append_listed(kTokenizerTables.compatibility, c, out)) &&
             !append_listed(kTokenizerTables.canonical, c, out)) {
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
  const auto table = kTokenizerTables.compositions;
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
      return kTokenizerTables.unstable_nfc;
    case NormalForm::kNfd:
      return kTokenizerTables.unstable_nfd;
    case NormalForm::kNfkc:
      return kTokenizerTables.unstable_nfkc;
    case NormalForm::kNfkd:
      return kTokenizerTables.unstable_nfkd;
  }
  return {};
}

}  // namespace

std::string normalize(std::string_view text, NormalForm form) {
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

}  // namespace mustafar::unicode
