// Character tables behind unicode.h, written by tools/make_jinja_unicode_data.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mustafar::jinja {

struct CodeRange {
  uint32_t first, last;  // inclusive
};

// The characters first, first + stride ... last map to themselves plus delta.
struct CaseRun {
  uint32_t first, last, stride;
  int32_t delta;
};

struct CaseSpecial {
  uint32_t code;
  uint32_t mapped[3];  // 0 ends it
};

extern const CodeRange kAlpha[], kDecimal[], kDigit[], kNumeric[], kUpper[], kLower[], kTitle[],
    kPrintable[], kCased[], kIgnorable[];
extern const size_t kAlphaCount, kDecimalCount, kDigitCount, kNumericCount, kUpperCount,
    kLowerCount, kTitleCount, kPrintableCount, kCasedCount, kIgnorableCount;
extern const CaseRun kToUpper[], kToLower[], kToTitle[];
extern const size_t kToUpperCount, kToLowerCount, kToTitleCount;
extern const CaseSpecial kToUpperSpecial[], kToLowerSpecial[], kToTitleSpecial[];
extern const size_t kToUpperSpecialCount, kToLowerSpecialCount, kToTitleSpecialCount;

}  // namespace mustafar::jinja
