// Documents and questions whose answers are known because they were made up.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cli/eval/answer_task.h"
#include "cli/eval/dialogue.h"
#include "cli/eval/prose.h"
#include "mustafar/tokenizer.h"

namespace mustafar::cli {

struct MadeOptions {
  std::vector<int64_t> lengths;  // tokens of a case in all: document, questions, replies
  std::vector<double> depths;    // percent, of what is hidden
  int32_t tries = 1;             // cases per length (and depth)
  uint64_t seed = 1;
};

class CaseMaker {
 public:
  // All must outlive it.
  CaseMaker(const Tokenizer& tokenizer, const Dialogue& dialogue, const Prose& prose,
            const MadeOptions& options)
      : tokenizer_(tokenizer), dialogue_(dialogue), prose_(prose), options_(options) {}

  // A sentence with a code of seven digits for a word, hidden at a depth, asked for; keys - 1
  // others like it elsewhere.
  std::vector<EvalCase> needles(int32_t keys, int32_t reply_tokens) const;
  // A list of `words` words at the head of the document, to be repeated.
  std::vector<EvalCase> copies(int32_t words) const;
  // `facts` facts in a document, asked for one after another in other order.
  std::vector<EvalCase> interviews(int32_t facts, int32_t reply_tokens) const;

 private:
  // Makes the document of `one` from head and prose with the inserts, so that the case with
  // reply_tokens a turn stays below `length` tokens. Throws std::invalid_argument where there is no
  // room.
  void fill(EvalCase& one, int64_t length, const std::string& head,
            const std::vector<Prose::Insert>& inserts, int64_t reply_tokens, uint64_t seed) const;

  const Tokenizer& tokenizer_;
  const Dialogue& dialogue_;
  const Prose& prose_;
  const MadeOptions& options_;
};

}  // namespace mustafar::cli
