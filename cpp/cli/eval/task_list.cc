#include "cli/eval/task_list.h"

#include <filesystem>
#include <functional>
#include <stdexcept>
#include <utility>

#include "cli/eval/answer_task.h"
#include "cli/eval/jsonl_cases.h"
#include "cli/eval/ppl_task.h"
#include "cli/eval/results.h"

namespace mustafar::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr int32_t kNeedles = 4;     // of needle-multi
constexpr int64_t kDecodeCost = 8;  // a decoded token's time, in prefilled tokens, about

// The lengths asked for, or those of the usual ones that the model's context has room for.
std::vector<int64_t> lengths_of(const EvalOptions& options, const Model& model) {
  const int64_t context = model.config().max_position_embeddings;
  for (const int64_t length : options.lengths) {
    if (length > context) {
      throw std::invalid_argument("--lengths has " + std::to_string(length) +
                                  ", more than the model's context of " + std::to_string(context) +
                                  " tokens");
    }
  }
  if (!options.lengths.empty()) return options.lengths;
  std::vector<int64_t> lengths;
  for (const int64_t length : {1024, 2048, 4096, 8000}) {
    if (length <= context) lengths.push_back(length);
  }
  if (lengths.empty()) lengths.push_back(context);
  return lengths;
}

Json made_parameters(const EvalOptions& options, const EvalMaterial& material) {
  return {{"text", material.text.empty() ? Json() : Json(text_hash(material.text))},
          {"lengths", material.made.lengths},
          {"tries", options.tries},
          {"seed", options.seed},
          {"chat", material.dialogue.is_chat()}};
}

std::unique_ptr<EvalTask> make_task(const std::string& name, const EvalOptions& options,
                                    const Model& model, const EvalMaterial& material) {
  if (name == "ppl") {
    return std::make_unique<PplTask>(model, material.text, options.file, options.chunk_tokens,
                                     options.max_chunks, options.output);
  }
  const auto maker = std::make_shared<CaseMaker>(model.tokenizer(), material.dialogue,
                                                 material.prose, material.made);
  Json parameters = made_parameters(options, material);
  AnswerRules rules;
  rules.max_new_tokens = options.reply_tokens;
  int64_t documents = options.tries, replies = options.tries * rules.max_new_tokens;
  std::function<std::vector<EvalCase>()> make;
  if (name == "copy") {
    parameters["words"] = options.words;
    rules.forced = true;
    replies = options.tries * options.words;
    make = [maker, &options] { return maker->copies(options.words); };
  } else if (name == "qa") {
    parameters["facts"] = options.facts;
    parameters["reply_tokens"] = options.reply_tokens;
    rules.conversation = true;
    replies *= options.facts;
    make = [maker, &options] { return maker->interviews(options.facts, options.reply_tokens); };
  } else {
    const int32_t keys = name == "needle" ? 1 : kNeedles;
    rules.stop = {".", "\n"};  // what is said after the code is of no interest
    parameters["depths"] = options.depths;
    parameters["reply_tokens"] = options.reply_tokens;
    documents *= static_cast<int64_t>(options.depths.size());
    replies *= static_cast<int64_t>(options.depths.size());
    make = [maker, &options, keys] { return maker->needles(keys, options.reply_tokens); };
  }
  int64_t work = 0;
  for (const int64_t length : material.made.lengths) {
    work += documents * length + kDecodeCost * replies;
  }
  return std::make_unique<AnswerTask>(model, material.dialogue, name, std::move(parameters), rules,
                                      work, std::move(make));
}

std::unique_ptr<EvalTask> make_jsonl_task(const std::string& file, const EvalOptions& options,
                                          const Model& model, const EvalMaterial& material) {
  const std::string text = read_text(file);
  const int64_t room = model.config().max_position_embeddings - options.reply_tokens;
  JsonlCases cases = read_jsonl(text, file, model, material.dialogue, room, options.max_cases);
  AnswerRules rules;
  rules.every_answer = cases.every_answer;
  rules.f1 = !cases.every_answer;
  rules.max_new_tokens = options.reply_tokens;
  const Json parameters = {{"text", text_hash(text)},
                           {"cases", cases.cases.size()},
                           {"reply_tokens", options.reply_tokens},
                           {"chat", material.dialogue.is_chat()}};
  const int64_t work =
      cases.tokens + kDecodeCost * options.reply_tokens * static_cast<int64_t>(cases.cases.size());
  const std::string name = "jsonl:" + std::filesystem::path(file).stem().string();
  return std::make_unique<AnswerTask>(model, material.dialogue, name, parameters, rules, work,
                                      [made = std::move(cases.cases)] { return made; });
}

}  // namespace

EvalMaterial::EvalMaterial(const EvalOptions& options, const Model& model)
    : text(options.file.empty() ? "" : read_text(options.file)),
      dialogue(model, !options.no_chat),
      prose(text),
      made{lengths_of(options, model), options.depths, options.tries, options.seed} {}

std::vector<std::unique_ptr<EvalTask>> eval_tasks(const EvalOptions& options, const Model& model,
                                                  const EvalMaterial& material) {
  std::vector<std::string> names = options.tasks;
  if (names.empty() && options.jsonl.empty()) {
    for (const char* name : kEvalTasks) {
      if (std::string(name) != "ppl" || !options.file.empty()) names.push_back(name);
    }
  }
  std::vector<std::unique_ptr<EvalTask>> tasks;
  for (const std::string& name : names) tasks.push_back(make_task(name, options, model, material));
  for (const std::string& file : options.jsonl) {
    tasks.push_back(make_jsonl_task(file, options, model, material));
  }
  return tasks;
}

}  // namespace mustafar::cli
