// Options that several sub-commands share, spelled as llama.cpp's users know them.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "mustafar/kv_config.h"
#include "mustafar/model.h"
#include "mustafar/sampling.h"

namespace mustafar::cli {

// -m --device --dtype -w -t --kv-budget
struct ModelFlags {
  std::string folder;  // empty: the demo model
  std::string device = "auto";
  std::string dtype = "auto";
  std::string weights = "auto";
  int32_t threads = 0;
  uint64_t kv_budget = 0;  // bytes

  void add_to(CLI::App& command);
  ModelOptions options() const;
  Model load() const;  // with a progress bar; Ctrl-C throws Cancelled
};

// --device
CLI::Option* add_device_option(CLI::App& command, std::string& device);

// -w
CLI::Option* add_weights_option(CLI::App& command, std::string& weights);

// --kv --sparsity --k-sparsity --v-sparsity --pattern --window --sinks --kv-dtype --bits --k-bits
// --v-bits --k-policy --v-policy --profile. What is not given is the preset's.
struct CacheFlags {
  std::string preset = "lossless";
  std::map<std::string, std::function<void(KVConfig&)>> given;  // what sets a field, by its name
  std::optional<std::string> profile;

  void add_to(CLI::App& command);
  // Checked. Throws std::invalid_argument naming the option's field, ModelError for a bad profile.
  KVConfig resolve(const Model& model) const;
  KVConfig validate() const;  // all but the profile, which is left out; before a model is loaded
  std::string profile_name() const;  // as given, or the preset's
};

// Profile::resolve for a person: what it notes goes to stderr, with a progress bar; Ctrl-C throws
// Cancelled.
std::shared_ptr<const Profile> resolve_profile(const std::string& name, const Model& model,
                                               bool costs = false);

// -n -s --temp --top-k --top-p --min-p --repeat-penalty ... --stop --logprobs
struct SamplingFlags {
  SamplingParams params;
  int64_t n_predict = params.max_new_tokens;  // -1: until the context is full
  int64_t seed = -1;                          // -1: drawn from the system
  std::vector<std::string> logit_bias;        // "ID+BIAS" or "ID-BIAS"

  void add_to(CLI::App& command);
  // Throws std::invalid_argument for a bias that can't be read.
  SamplingParams resolve() const;
};

// -p -f, or a pipe
struct PromptFlags {
  std::optional<std::string> text;
  std::optional<std::string> file;  // "-": standard input
  bool escape = false;
  bool special = false;  // special tokens that the text spells are tokens

  void add_to(CLI::App& command);
  // Throws std::invalid_argument where there is none, Error for a file that can't be read.
  std::string read() const;
};

// What the library says of arguments, with the command's options for the names that they have in
// Python and C++.
std::string with_option_names(const std::string& message);

// A whole file or, for "-", standard input. Throws Error naming it.
std::string read_text(const std::string& path);

}  // namespace mustafar::cli
