// What an unfinished task ppl has measured: its rows come at the end, when all chunks have been
// scored under all settings, so every chunk and setting is kept beside the file of results until
// then, and a run that was cut short goes on where it ended.
#pragma once

#include <cstddef>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "cli/quality.h"

namespace mustafar::cli {

class PartialResults final : public KnownFigures {
 public:
  // output: the file of results, empty for none: then nothing is kept. basis: all that figures
  // depend on beside setting and chunk; runs of another have a file of their own. Lines that are
  // cut short count as missing.
  PartialResults(const std::filesystem::path& output, const nlohmann::ordered_json& basis);

  const Figures* find(const KVConfig& setting, size_t chunk) const override;
  // Throws Error where the file can't be written.
  void add(const KVConfig& setting, size_t chunk, const Figures& figures) override;
  // The rows are in the results.
  void remove();

 private:
  void read_line(const std::string& line);

  std::filesystem::path file_;
  std::map<std::pair<std::string, size_t>, Figures> known_;  // by a setting's hash and a chunk
};

}  // namespace mustafar::cli
