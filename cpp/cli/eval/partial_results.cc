#include "cli/eval/partial_results.h"

#include <fstream>
#include <system_error>

#include "cli/eval/results.h"
#include "cli/kv_setting.h"
#include "cli/report.h"
#include "mustafar/error.h"

namespace mustafar::cli {
namespace {

using Json = nlohmann::ordered_json;

std::string setting_hash(const KVConfig& setting) {
  return text_hash(dump(identity_json(setting)));
}

}  // namespace

PartialResults::PartialResults(const std::filesystem::path& output, const Json& basis) {
  if (output.empty()) return;
  file_ = output.string() + "." + text_hash(dump(basis)) + ".part";
  std::ifstream in(file_);
  for (std::string line; std::getline(in, line);) read_line(line);
}

void PartialResults::read_line(const std::string& line) {
  const Json json = Json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return;
  try {
    Figures figures;
    figures.nll = json.at("nll").get<std::vector<double>>();
    figures.divergence = json.at("divergence").get<std::vector<double>>();
    figures.same_top = json.at("same_top").get<int64_t>();
    known_[{json.at("setting").get<std::string>(), json.at("chunk").get<size_t>()}] =
        std::move(figures);
  } catch (const Json::exception&) {
    // Not a line of ours, or with figures that are not finite: measured again.
  }
}

const Figures* PartialResults::find(const KVConfig& setting, size_t chunk) const {
  const auto at = known_.find({setting_hash(setting), chunk});
  return at == known_.end() ? nullptr : &at->second;
}

void PartialResults::add(const KVConfig& setting, size_t chunk, const Figures& figures) {
  if (file_.empty()) return;
  const Json line = {{"setting", setting_hash(setting)},
                     {"chunk", chunk},
                     {"same_top", figures.same_top},
                     {"nll", figures.nll},
                     {"divergence", figures.divergence}};
  std::ofstream out(file_, std::ios::app);
  // A line that was cut short must not swallow this one.
  out << "\n" << dump(line) << std::flush;
  if (!out) throw Error(file_.string() + " can't be written");
}

void PartialResults::remove() {
  std::error_code ignored;
  if (!file_.empty()) std::filesystem::remove(file_, ignored);
}

}  // namespace mustafar::cli
