// How answers are judged.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace mustafar::cli {

// Whether text contains the answer, ASCII letter case and surrounding space aside.
bool contains_answer(std::string_view text, std::string_view answer);

// F1 of the words of the two, as question answering is usually judged: lower case, without
// punctuation and English articles, words counted as often as they occur. 0..1.
double word_f1(std::string_view text, std::string_view answer);

struct Interval {
  double low = 0;
  double high = 1;
};
// Wilson's score interval (1927) of a share of `right` of n at 95 %.
Interval wilson(double right, double n);

}  // namespace mustafar::cli
