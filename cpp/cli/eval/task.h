// What `mustafar eval` can do with a cache setting.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "mustafar/kv_config.h"
#include "mustafar/model.h"

namespace mustafar::cli {

struct EvalSetting {
  std::string name;  // as it was given
  KVConfig config;
};

class EvalTask {
 public:
  using Json = nlohmann::ordered_json;
  using Progress = std::function<void(int64_t done)>;  // of work(), throws to end the task
  using Done = std::function<void(size_t setting, Json result)>;

  virtual ~EvalTask() = default;
  virtual std::string name() const = 0;
  // All that its results depend on beside model and setting.
  virtual Json parameters() const = 0;
  // About how many tokens' time one setting takes, the dense cache included.
  virtual int64_t work() const = 0;
  // Measures the settings, hands each result to done as soon as it is known. dense: the result of
  // the dense cache, or null where that is settings[0].
  virtual void run(const std::vector<EvalSetting>& settings, const Json* dense,
                   const Progress& progress, const Done& done) = 0;
  // The columns of its table: names, and a result's cells.
  virtual std::vector<std::string> columns() const = 0;
  virtual std::vector<std::string> cells(const Json& result) const = 0;
};

}  // namespace mustafar::cli
