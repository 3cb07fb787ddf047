// The file of results: a row per (task, setting), written whole after each, so that a run that was
// cut short goes on where it ended.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cli/eval/task.h"
#include "mustafar/model.h"

namespace mustafar::cli {

class Results {
 public:
  using Json = nlohmann::ordered_json;

  // file: empty for none. What is there is read; throws Error where it is no file of results.
  Results(const Model& model, const std::filesystem::path& file);

  // The result of a row of this model, or none.
  std::optional<Json> find(const EvalTask& task, const EvalSetting& setting) const;
  // Adds a row and writes the file. Throws Error where that fails.
  void add(const EvalTask& task, const EvalSetting& setting, Json result);
  // A row as the file has it, with the setting under the name given here.
  Json row(const EvalTask& task, const EvalSetting& setting, const Json& result) const;

 private:
  Json key(const EvalTask& task, const EvalSetting& setting) const;

  const Model& model_;
  const std::filesystem::path file_;
  Json model_key_;
  std::vector<Json> rows_;
};

// What results depend on of a model.
nlohmann::ordered_json model_key(const Model& model);

// Identity of a text: 16 hex digits.
std::string text_hash(std::string_view text);

}  // namespace mustafar::cli
