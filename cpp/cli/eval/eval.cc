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
#include "cli/eval/results.h"
#include "cli/eval/table.h"
#include "cli/eval/task_list.h"
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

std::vector<EvalSetting> settings_of(const EvalOptions& options, const Model& model) {
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

void check(const EvalOptions& options) {
  for (const std::string& task : options.tasks) {
    if (std::find(std::begin(kEvalTasks), std::end(kEvalTasks), task) == std::end(kEvalTasks)) {
      std::string known;
      for (const char* name : kEvalTasks) known += (known.empty() ? "" : ", ") + std::string(name);
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

int eval(const EvalOptions& options) {
  check(options);
  const InterruptGuard guard;
  const Model model = options.model.load();
  const std::vector<EvalSetting> settings = settings_of(options, model);
  Results results(model, options.output);
  const EvalMaterial material(options, model);
  const auto tasks = eval_tasks(options, model, material);
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
  const auto options = std::make_shared<EvalOptions>();
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
