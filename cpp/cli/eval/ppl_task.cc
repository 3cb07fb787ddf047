#include "cli/eval/ppl_task.h"

#include <utility>

#include "cli/eval/partial_results.h"
#include "cli/eval/results.h"
#include "cli/quality.h"
#include "cli/terminal.h"

namespace mustafar::cli {

PplTask::PplTask(const Model& model, const std::string& text, const std::string& file,
                 int64_t chunk_tokens, int64_t max_chunks, std::filesystem::path output)
    : model_(model),
      output_(std::move(output)),
      chunks_(chunks_of(model, text, file, chunk_tokens, max_chunks)) {
  parameters_ = {
      {"text", text_hash(text)}, {"chunks", chunks_.size()}, {"chunk_tokens", chunks_[0].size()}};
}

int64_t PplTask::work() const {
  return static_cast<int64_t>(chunks_.size() * (chunks_[0].size() - 1));
}

void PplTask::run(const std::vector<EvalSetting>& settings, const Json* dense,
                  const Progress& progress, const Done& done) {
  // The dense cache is measured in any case.
  const size_t first = dense == nullptr ? 1 : 0;
  std::vector<KVConfig> configs;
  for (size_t i = first; i < settings.size(); i++) configs.push_back(settings[i].config);
  const int64_t all = work() * static_cast<int64_t>(settings.size());
  PartialResults partial(output_, {{"model", model_key(model_)}, {"parameters", parameters_}});
  const Quality quality = measure_quality(
      model_, configs, chunks_,
      [&](int64_t part, int64_t total) {
        progress(static_cast<int64_t>(static_cast<double>(all) * static_cast<double>(part) /
                                      static_cast<double>(total)));
      },
      &partial);
  if (dense == nullptr) done(0, to_json(quality.dense));
  for (size_t i = first; i < settings.size(); i++) {
    done(i, to_json(quality.settings[i - first]));
  }
  partial.remove();
}

std::vector<std::string> PplTask::columns() const {
  return {"tokens", "PPL", "KLD mean", "median", "99.9 %", "same top"};
}

std::vector<std::string> PplTask::cells(const Json& result) const {
  const auto number = [&](const char* key, int decimals, double factor = 1) {
    const Json& value = result.at(key);
    return value.is_number() ? format_number(factor * value.get<double>(), decimals) : "nan";
  };
  return {number("tokens", 0),
          number("ppl", 4) + " ± " + number("ppl_error", 4),
          number("kld_mean", 5) + " ± " + number("kld_mean_error", 5),
          number("kld_median", 5),
          number("kld_99_9", 4),
          number("same_top_p", 2, 100) + " ± " + number("same_top_p_error", 2, 100) + " %"};
}

}  // namespace mustafar::cli
