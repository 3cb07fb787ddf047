// `mustafar eval`: what cache settings cost on a model, by perplexity, retrieval, copying and
// conversation. A grid of tasks and settings whose results survive an interruption.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cli/commands.h"
#include "cli/eval/answer_task.h"
#include "cli/eval/jsonl_cases.h"
#include "cli/eval/made_cases.h"
#include "cli/eval/ppl_task.h"
#include "cli/eval/results.h"
#include "cli/eval/table.h"
#include "cli/interrupt.h"
#include "cli/kv_setting.h"
#include "cli/options.h"
#include "cli/quality.h"
#include "cli/report.h"
#include "cli/terminal.h"
#include "mustafar/error.h"

namespace mustafar::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kTasks[] = {"ppl", "needle", "needle-multi", "copy", "qa"};
constexpr int32_t kNeedles = 4;     // of needle-multi
constexpr int32_t kMostFacts = 16;  // different towns
constexpr int64_t kDecodeCost = 8;  // a decoded token's time, in prefilled tokens, about

struct Options {
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

std::vector<EvalSetting> settings_of(const Options& options, const Model& model) {
  std::vector<std::string> texts;
  for (const std::string& list : options.settings) {
    const auto some = split_kv_settings(list);
    texts.insert(texts.end(), some.begin(), some.end());
  }
  if (!options.grid.empty()) {
    const auto some = read_kv_settings(options.grid);
    texts.insert(texts.end(), some.begin(), some.end());
  }
  if (texts.empty()) texts = {"default"};
  // The dense cache, which the others are compared with, comes first in any case.
  std::vector<EvalSetting> settings = {{"dense", dense_setting()}};
  for (const std::string& text : texts) {
    const KVConfig config = parse_kv_setting(text, model);
    const bool known = std::any_of(settings.begin(), settings.end(), [&](const EvalSetting& s) {
      return identity_json(s.config) == identity_json(config);
    });
    if (!known) settings.push_back({text, config});
  }
  return settings;
}

// The lengths asked for, or those of the usual ones that the model's context has room for.
std::vector<int64_t> lengths_of(const Options& options, const Model& model) {
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

// Everything that tasks are made of; outlives them.
struct Material {
  Material(const Options& options, const Model& model)
      : text(options.file.empty() ? "" : read_text(options.file)),
        dialogue(model, !options.no_chat),
        prose(text) {
    made = {lengths_of(options, model), options.depths, options.tries, options.seed};
  }

  const std::string text;
  const Dialogue dialogue;
  const Prose prose;
  MadeOptions made;
};

Json made_parameters(const Options& options, const Material& material) {
  return {{"text", material.text.empty() ? Json() : Json(text_hash(material.text))},
          {"lengths", material.made.lengths},
          {"tries", options.tries},
          {"seed", options.seed},
          {"chat", material.dialogue.is_chat()}};
}

std::unique_ptr<EvalTask> make_task(const std::string& name, const Options& options,
                                    const Model& model, const Material& material) {
  if (name == "ppl") {
    return std::make_unique<PplTask>(model, material.text, options.file, options.chunk_tokens,
                                     options.max_chunks);
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

std::unique_ptr<EvalTask> make_jsonl_task(const std::string& file, const Options& options,
                                          const Model& model, const Material& material) {
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

std::vector<std::unique_ptr<EvalTask>> tasks_of(const Options& options, const Model& model,
                                                const Material& material) {
  std::vector<std::string> names = options.tasks;
  if (names.empty() && options.jsonl.empty()) {
    for (const char* name : kTasks) {
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

// Runs what the results do not have yet.
void run_all(const std::vector<std::unique_ptr<EvalTask>>& tasks,
             const std::vector<EvalSetting>& settings, Results& results) {
  struct Part {
    EvalTask* task;
    std::vector<EvalSetting> missing;
    std::optional<Json> dense;
  };
  std::vector<Part> parts;
  int64_t total = 0, before = 0;
  for (const auto& task : tasks) {
    Part part{task.get(), {}, results.find(*task, settings[0])};
    for (const EvalSetting& setting : settings) {
      if (!results.find(*task, setting)) part.missing.push_back(setting);
    }
    if (part.missing.empty()) continue;
    total += task->work() * static_cast<int64_t>(part.missing.size());
    parts.push_back(std::move(part));
  }
  Progress bar("evaluating");
  for (Part& part : parts) {
    part.task->run(
        part.missing, part.dense ? &*part.dense : nullptr,
        [&](int64_t done) {
          throw_if_interrupted();
          bar.update(before + done, total);
        },
        [&](size_t i, Json result) {
          results.add(*part.task, part.missing[i], std::move(result));
        });
    before += part.task->work() * static_cast<int64_t>(part.missing.size());
  }
}

void print_results(const Model& model, const std::vector<std::unique_ptr<EvalTask>>& tasks,
                   const std::vector<EvalSetting>& settings, const Results& results) {
  std::vector<std::string> columns = {"setting", "bytes/token", "of dense"};
  for (const auto& task : tasks) {
    for (const std::string& column : task->columns()) columns.push_back(column);
  }
  std::vector<std::vector<std::string>> rows;
  for (const EvalSetting& setting : settings) {
    const Json store = store_json(model, setting.config);
    std::vector<std::string>& row = rows.emplace_back();
    row = {setting.name, format_number(store.at("bytes_per_token").get<double>(), 0),
           format_number(100 * store.at("of_dense").get<double>(), 1) + " %"};
    for (const auto& task : tasks) {
      for (std::string& cell : task->cells(*results.find(*task, setting))) {
        row.push_back(std::move(cell));
      }
    }
  }
  print_markdown(columns, rows);
}

void print_json(const Model& model, const std::vector<std::unique_ptr<EvalTask>>& tasks,
                const std::vector<EvalSetting>& settings, const Results& results) {
  Json rows = Json::array();
  for (const auto& task : tasks) {
    for (const EvalSetting& setting : settings) {
      rows.push_back(results.row(*task, setting, *results.find(*task, setting)));
    }
  }
  const Json out = {{"model", model.folder().string()}, {"rows", rows}};
  std::printf("%s\n", dump(out, 2).c_str());
}

void check(const Options& options) {
  for (const std::string& task : options.tasks) {
    if (std::find(std::begin(kTasks), std::end(kTasks), task) == std::end(kTasks)) {
      std::string known;
      for (const char* name : kTasks) known += (known.empty() ? "" : ", ") + std::string(name);
      throw std::invalid_argument("there is no task \"" + task + "\"; the tasks are " + known +
                                  ", and --jsonl for questions from a file");
    }
    if (task == "ppl" && options.file.empty()) {
      throw std::invalid_argument("the task ppl needs a text: give -f FILE");
    }
  }
  for (const double depth : options.depths) {
    if (!(depth >= 0 && depth <= 100)) {
      throw std::invalid_argument("--depths takes percent between 0 and 100");
    }
  }
}

int eval(const Options& options) {
  check(options);
  const InterruptGuard guard;
  const Model model = options.model.load();
  const std::vector<EvalSetting> settings = settings_of(options, model);
  Results results(model, options.output);
  const Material material(options, model);
  const auto tasks = tasks_of(options, model, material);
  try {
    run_all(tasks, settings, results);
  } catch (const Cancelled&) {
    if (!options.output.empty()) {
      std::fprintf(stderr, "mustafar: what was finished is in %s; the same command goes on there\n",
                   options.output.c_str());
    }
    throw;
  }
  if (options.json) {
    print_json(model, tasks, settings, results);
  } else {
    print_results(model, tasks, settings, results);
  }
  return kExitOk;
}

}  // namespace

void add_eval(CLI::App& app, Run& run) {
  const auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand(
      "eval", "Measure what cache settings cost: perplexity, retrieval, copying, conversation");
  options->model.add_to(*command);
  const auto option = [&](const char* names, auto& value, const char* help) {
    return command->add_option(names, value, help)->capture_default_str();
  };
  const auto list = [&](const char* names, auto& value, const char* help) {
    return option(names, value, help)->delimiter(',');
  };
  list("--tasks", options->tasks,
       "Comma list: ppl (needs -f), needle, needle-multi, copy, qa; without: all");
  option("--settings", options->settings,
         "Settings with ; between them: \"sparsity=0.5,value_dtype=int8; dense\"; repeatable")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->allow_extra_args(false);
  option("--grid", options->grid, "File of settings, one a line, # for comments");
  option("-f,--file", options->file,
         "Text: what ppl scores, and what things are hidden in (without: made-up prose)");
  option("--jsonl", options->jsonl, "Questions in the form of LongBench or RULER; repeatable")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->allow_extra_args(false);
  option("-c,--ctx-size", options->chunk_tokens, "ppl: tokens per chunk")
      ->check(CLI::Range(int64_t{4}, int64_t{1} << 30));
  option("--chunks", options->max_chunks, "ppl: chunks to score at most (-1: all)");
  list("--lengths", options->lengths,
       "Tokens of a case, comma list (1024,2048,4096,8000 as far as the context goes)")
      ->check(CLI::Range(int64_t{64}, int64_t{1} << 30));
  list("--depths", options->depths, "needle: percent of the text before it, comma list");
  option("--tries", options->tries, "Cases per length (and depth)")->check(CLI::Range(1, 1000));
  option("--words", options->words, "copy: words in the list")->check(CLI::Range(1, 80));
  option("--facts", options->facts, "qa: facts to ask for")->check(CLI::Range(1, kMostFacts));
  option("-n,--n-predict", options->reply_tokens, "Tokens of a reply at most")
      ->check(CLI::Range(1, 4096));
  option("--max-cases", options->max_cases, "Questions of a --jsonl file at most (-1: all)");
  option("-s,--seed", options->seed, "Of everything that is made up");
  command->add_flag("--no-chat", options->no_chat, "Plain text, though the model has a template");
  command->add_flag("--json", options->json, "JSON instead of a table");
  option("-o,--output", options->output,
         "File of results: written after every row; what it has is not run again");
  command->callback([options, &run] { run = [options] { return eval(*options); }; });
}

}  // namespace mustafar::cli
