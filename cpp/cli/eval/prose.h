// Prose to hide things in: sentences of a text, or made up.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "mustafar/tokenizer.h"

namespace mustafar::cli {

using Random = std::mt19937_64;

// One of a list; the same on every machine.
template <typename List>
const auto& pick(const List& list, Random& random) {
  return list[random() % std::size(list)];
}

class Prose {
 public:
  // text: whose sentences to use; empty: made-up ones. Throws std::invalid_argument for a text that
  // has fewer than 20 sentences.
  explicit Prose(const std::string& text);

  struct Insert {
    double depth = 0;  // 0: before the first sentence, 1: after the last
    std::string sentence;
  };
  // About `tokens` tokens of sentences, from a random place of the text on, with the inserts among
  // them.
  std::string document(const Tokenizer& tokenizer, int64_t tokens, std::vector<Insert> inserts,
                       Random& random) const;

 private:
  std::vector<std::string> sentences_;  // empty: made up
};

}  // namespace mustafar::cli
