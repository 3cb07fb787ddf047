// The data behind this folder, in two files that tools/make_unicode_tables.py writes. They are of
// different Unicode versions, because they imitate different programs: tokenizer_tables.cc follows
// the newest Unicode, as the libraries behind tokenizer.json do, and python_tables.cc the str of
// the Python that renders chat templates. Every table is sorted by code point.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

namespace mustafar::unicode {

struct CodePointRange {
  char32_t first, last;  // inclusive
};

struct CombiningClassRange {
  char32_t first, last;  // inclusive
  int32_t combining_class;
};

// The characters first, first + stride ... last map to themselves plus delta.
struct CaseRun {
  char32_t first, last;
  uint32_t stride;
  int32_t delta;
};

// A character that maps to several.
struct CaseExpansion {
  char32_t code_point;
  char32_t mapped[3];  // 0 behind the last
};

struct Decomposition {
  char32_t code_point;
  uint16_t offset, length;  // of the full decomposition in the pool
};

struct Composition {
  char32_t first, second, composed;
};

struct TokenizerTables {
  std::span<const Decomposition> canonical;      // without Hangul syllables
  std::span<const Decomposition> compatibility;  // where it differs from the canonical one
  std::span<const char32_t> decomposition_pool;
  std::span<const Composition> compositions;               // primary composites, without Hangul
  std::span<const CombiningClassRange> combining_classes;  // where the class is not 0
  // Characters that a normal form may change, or that may interact with their neighbours in it.
  std::span<const CodePointRange> unstable_nfc, unstable_nfd, unstable_nfkc, unstable_nfkd;
  std::span<const CodePointRange> word;
};

struct PythonTables {
  std::span<const CodePointRange> alpha, decimal, digit, numeric, upper, lower, title, printable;
  std::span<const CodePointRange> cased, case_ignorable;
  std::span<const CaseRun> to_upper_runs;
  std::span<const CaseExpansion> to_upper_expansions;
  std::span<const CaseRun> to_lower_runs;
  std::span<const CaseExpansion> to_lower_expansions;
  std::span<const CaseRun> to_title_runs;
  std::span<const CaseExpansion> to_title_expansions;
};

extern const TokenizerTables kTokenizerTables;
extern const PythonTables kPythonTables;

// The range of a table that holds c, or null.
template <typename Range>
const Range* find_range(std::span<const Range> table, char32_t c) {
  const auto it =
      std::lower_bound(table.begin(), table.end(), c,
                       [](const Range& range, char32_t value) { return range.last < value; });
  return it != table.end() && it->first <= c ? &*it : nullptr;
}

// The entry of a table for c, or null.
template <typename Entry>
const Entry* find_entry(std::span<const Entry> table, char32_t c) {
  const auto it =
      std::lower_bound(table.begin(), table.end(), c,
                       [](const Entry& entry, char32_t value) { return entry.code_point < value; });
  return it != table.end() && it->code_point == c ? &*it : nullptr;
}

}  // namespace mustafar::unicode
