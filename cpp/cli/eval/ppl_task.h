// Perplexity and divergence from the dense cache on a text.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "cli/eval/task.h"

namespace mustafar::cli {

class PplTask final : public EvalTask {
 public:
  // file: of the text, for messages; output: of the results, or empty. Arguments as chunks_of.
  PplTask(const Model& model, const std::string& text, const std::string& file,
          int64_t chunk_tokens, int64_t max_chunks, std::filesystem::path output);
  std::string name() const override { return "ppl"; }
  Json parameters() const override { return parameters_; }
  int64_t work() const override;
  // All results come at the end: the settings take turns at a part of the text, for which the dense
  // cache's distributions are kept. What is known until then stands beside the output.
  void run(const std::vector<EvalSetting>& settings, const Json* dense, const Progress& progress,
           const Done& done) override;
  std::vector<std::string> columns() const override;
  std::vector<std::string> cells(const Json& result) const override;

 private:
  const Model& model_;
  const std::filesystem::path output_;
  std::vector<std::vector<int32_t>> chunks_;
  Json parameters_;
};

}  // namespace mustafar::cli
