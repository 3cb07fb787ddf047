#include "text/unicode/case_mapping.h"

#include "text/unicode/tables.h"
#include "text/unicode/utf8.h"

namespace mustafar::unicode {

namespace {

void append_mapped(char32_t c, std::span<const CaseRun> runs,
                   std::span<const CaseExpansion> expansions, std::string* out) {
  const CaseRun* run = find_range(runs, c);
  if (run && (c - run->first) % run->stride == 0) {
    append_utf8(c + static_cast<char32_t>(run->delta), out);
  } else if (const CaseExpansion* expansion = find_entry(expansions, c)) {
    for (const char32_t mapped : expansion->mapped) {
      if (mapped) append_utf8(mapped, out);
    }
  } else {
    append_utf8(c, out);
  }
}

}  // namespace

void append_case(char32_t c, CaseMap map, std::string* out) {
  const PythonTables& tables = kPythonTables;
  switch (map) {
    case CaseMap::kUpper:
      return append_mapped(c, tables.to_upper_runs, tables.to_upper_expansions, out);
    case CaseMap::kLower:
      return append_mapped(c, tables.to_lower_runs, tables.to_lower_expansions, out);
    case CaseMap::kTitle:
      return append_mapped(c, tables.to_title_runs, tables.to_title_expansions, out);
  }
}

std::string lower_case(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t pos = 0; pos < text.size();) {
    append_case(next_code_point(text, &pos), CaseMap::kLower, &out);
  }
  return out;
}

}  // namespace mustafar::unicode
