#include "cli/eval/results.h"

#include <utility>

#include "cli/kv_setting.h"
#include "cli/options.h"
#include "cli/quality.h"
#include "cli/report.h"
#include "core/atomic_file.h"
#include "core/hash.h"
#include "mustafar/error.h"
#include "runtime/model_impl.h"

namespace mustafar::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kFormat = "mustafar eval 1";

}  // namespace

std::string text_hash(std::string_view text) {
  Hash64 hash;
  hash.add(text);
  return hash.hex();
}

Json model_key(const Model& model) {
  return {{"fingerprint", model.impl()->fingerprint},
          {"device", model.device()},
          {"dtype", model.dtype()}};
}

Results::Results(const Model& model, const std::filesystem::path& file)
    : model_(model), file_(file), model_key_(model_key(model)) {
  if (file_.empty() || !std::filesystem::exists(file_)) return;
  const auto refuse = [&](const std::string& why) {
    throw Error(file_.string() + " is not a file of mustafar eval's results: " + why);
  };
  const Json json = Json::parse(read_text(file_.string()), nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded()) refuse("it is not JSON");
  if (!json.is_object() || json.value("format", Json()) != kFormat) {
    refuse("\"format\" is not \"" + std::string(kFormat) + "\"");
  }
  if (!json.contains("rows") || !json["rows"].is_array()) refuse("\"rows\" is missing");
  for (const Json& row : json["rows"]) {
    for (const char* field : {"task", "model", "parameters", "setting", "result"}) {
      if (!row.is_object() || !row.contains(field)) {
        refuse("a row has no \"" + std::string(field) + "\"");
      }
    }
    rows_.push_back(row);
  }
}

Json Results::key(const EvalTask& task, const EvalSetting& setting) const {
  return {{"task", task.name()},
          {"model", model_key_},
          {"parameters", task.parameters()},
          {"setting", identity_json(setting.config)}};
}

std::optional<Json> Results::find(const EvalTask& task, const EvalSetting& setting) const {
  // Through text, as the file has it: numbers that were written compare with those that are not.
  const Json wanted = Json::parse(dump(key(task, setting)));
  for (const Json& row : rows_) {
    bool same = true;
    for (const auto& [field, value] : wanted.items()) same = same && row.at(field) == value;
    if (same) return row.at("result");
  }
  return std::nullopt;
}

Json Results::row(const EvalTask& task, const EvalSetting& setting, const Json& result) const {
  Json row = {{"name", setting.name}};
  row.update(key(task, setting));
  row["store"] = store_json(model_, setting.config);
  row["result"] = result;
  return row;
}

void Results::add(const EvalTask& task, const EvalSetting& setting, Json result) {
  rows_.push_back(Json::parse(dump(row(task, setting, result))));
  if (file_.empty()) return;
  const Json all = {
      {"format", kFormat}, {"model", model_.folder().filename().string()}, {"rows", rows_}};
  const std::string text = dump(all, 1) + "\n";
  AtomicFile file(file_);
  file.write(text.data(), text.size());
  file.commit();
}

}  // namespace mustafar::cli
