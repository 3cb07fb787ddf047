// Questions from files of LongBench and RULER: one JSON object a line.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cli/eval/answer_task.h"
#include "cli/eval/dialogue.h"
#include "mustafar/model.h"

namespace mustafar::cli {

struct JsonlCases {
  std::vector<EvalCase> cases;
  bool every_answer = false;  // RULER's outputs, each of which counts
  int64_t tokens = 0;         // of all cases together, about
};

// LongBench: fields context, input (the question), answers, dataset. RULER: fields input (text and
// question, which is its last line) and outputs. Documents that exceed `room` tokens with their
// question lose their middle. max_cases: -1 for all. Throws Error naming the line that is neither.
JsonlCases read_jsonl(const std::string& text, const std::string& file, const Model& model,
                      const Dialogue& dialogue, int64_t room, int64_t max_cases);

}  // namespace mustafar::cli
