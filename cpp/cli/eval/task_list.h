// The tasks of an evaluation, from what was asked for.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cli/eval/dialogue.h"
#include "cli/eval/made_cases.h"
#include "cli/eval/prose.h"
#include "cli/eval/task.h"
#include "cli/options.h"

namespace mustafar::cli {

inline constexpr const char* kEvalTasks[] = {"ppl", "needle", "needle-multi", "copy", "qa"};
inline constexpr int32_t kMostFacts = 16;  // of a task qa: it has so many towns

struct EvalOptions {
  ModelFlags model;
  std::vector<std::string> tasks;
  std::vector<std::string> settings;  // lists
  std::string grid;
  std::string file;
  std::vector<std::string> jsonl;
  int64_t chunk_tokens = 1024;
  int64_t max_chunks = 20;
  std::vector<int64_t> lengths;
  std::vector<double> depths = {0, 25, 50, 75, 100};
  int32_t tries = 1;
  int32_t words = 40;
  int32_t facts = 8;
  int32_t reply_tokens = 32;
  int64_t max_cases = -1;
  uint64_t seed = 1;
  bool no_chat = false;
  bool json = false;
  std::string output;
};

// Everything that tasks are made of; outlives them.
struct EvalMaterial {
  // Throws std::invalid_argument for lengths beyond the model's context.
  EvalMaterial(const EvalOptions& options, const Model& model);

  const std::string text;
  const Dialogue dialogue;
  const Prose prose;
  MadeOptions made;
};

// Options and material must outlive the tasks.
std::vector<std::unique_ptr<EvalTask>> eval_tasks(const EvalOptions& options, const Model& model,
                                                  const EvalMaterial& material);

}  // namespace mustafar::cli
