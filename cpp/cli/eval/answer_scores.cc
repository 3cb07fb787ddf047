#include "cli/eval/answer_scores.h"

#include <algorithm>
#include <cmath>
#include <map>

namespace mustafar::cli {
namespace {

char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; }

std::string lower_text(std::string_view text) {
  std::string out(text);
  std::transform(out.begin(), out.end(), out.begin(), lower);
  return out;
}

std::map<std::string, int> words_of(std::string_view text) {
  std::map<std::string, int> words;
  std::string word;
  const auto end_word = [&] {
    if (!word.empty() && word != "a" && word != "an" && word != "the") words[word]++;
    word.clear();
  };
  for (const char c : lower_text(text)) {
    const unsigned char u = static_cast<unsigned char>(c);
    if ((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || u >= 0x80) {
      word += c;
    } else if (c == ' ' || c == '\n' || c == '\t' || c == '\r') {
      end_word();
    }  // punctuation is left out: "Ruiz's" is one word
  }
  end_word();
  return words;
}

int count(const std::map<std::string, int>& words) {
  int sum = 0;
  for (const auto& [word, n] : words) sum += n;
  return sum;
}

}  // namespace

bool contains_answer(std::string_view text, std::string_view answer) {
  const size_t first = answer.find_first_not_of(" \t\r\n");
  if (first == std::string_view::npos) return false;
  answer = answer.substr(first, answer.find_last_not_of(" \t\r\n") - first + 1);
  return lower_text(text).find(lower_text(answer)) != std::string::npos;
}

double word_f1(std::string_view text, std::string_view answer) {
  const std::map<std::string, int> given = words_of(text), wanted = words_of(answer);
  int common = 0;
  for (const auto& [word, n] : given) {
    if (const auto it = wanted.find(word); it != wanted.end()) common += std::min(n, it->second);
  }
  if (common == 0) return 0;
  const double precision = static_cast<double>(common) / count(given);
  const double recall = static_cast<double>(common) / count(wanted);
  return 2 * precision * recall / (precision + recall);
}

Interval wilson(double right, double n) {
  if (n <= 0) return {};
  constexpr double z = 1.959963984540054;
  const double p = right / n, z2 = z * z / n;
  const double centre = (p + z2 / 2) / (1 + z2);
  const double half = z / (1 + z2) * std::sqrt(p * (1 - p) / n + z2 / (4 * n));
  return {std::max(0.0, centre - half), std::min(1.0, centre + half)};
}

}  // namespace mustafar::cli
