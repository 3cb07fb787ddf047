#include "cli/bench/options.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "cli/terminal.h"

namespace mustafar::cli {
namespace {

double parse_number(const std::string& text, const std::string& whole) {
  try {
    size_t end = 0;
    const double value = std::stod(text, &end);
    if (end == text.size()) return value;
  } catch (const std::exception&) {
    // Reported below, as for trailing characters.
  }
  throw std::invalid_argument("--sparsity takes numbers S or pairs K/V, not \"" + whole + "\"");
}

BenchSetting make_setting(const BenchOptions& options, const std::string& sparsity,
                          const std::string& dtype) {
  BenchSetting setting;
  KVConfig& kv = setting.config;
  const size_t slash = sparsity.find('/');
  if (slash == std::string::npos) {
    kv.sparsity = parse_number(sparsity, sparsity);
  } else {
    kv.k_sparsity = parse_number(sparsity.substr(0, slash), sparsity);
    kv.v_sparsity = parse_number(sparsity.substr(slash + 1), sparsity);
  }
  kv.value_dtype = parse_value_type(dtype);
  kv.pattern = parse_pattern(options.pattern);
  kv.window = options.window;
  kv.sink_tokens = options.sinks;
  kv.validate();
  if (!options.profile.empty()) setting.profile = options.profile;
  const bool dense = kv.effective_k_sparsity() == 0 && kv.effective_v_sparsity() == 0;
  setting.name = dtype + (dense ? " dense"
                                : " K" + format_number(kv.effective_k_sparsity(), 2).substr(1) +
                                      " V" + format_number(kv.effective_v_sparsity(), 2).substr(1));
  setting.dense = dense && kv.value_dtype == ValueType::kAuto;
  return setting;
}

}  // namespace

std::vector<BenchSetting> make_settings(const BenchOptions& options) {
  std::vector<BenchSetting> settings;
  for (const std::string& name : options.presets) {
    const KVPreset& preset = find_kv_preset(name);
    settings.push_back({name, preset.config, preset.profile, name == "dense"});
  }
  if (settings.empty()) {
    for (const std::string& dtype : options.kv_dtypes) {
      for (const std::string& sparsity : options.sparsities) {
        settings.push_back(make_setting(options, sparsity, dtype));
      }
    }
  }
  const auto is_dense = [](const BenchSetting& setting) { return setting.dense; };
  if (options.break_even && std::none_of(settings.begin(), settings.end(), is_dense)) {
    settings.insert(settings.begin(), make_setting(options, "0", "auto"));
  }
  return settings;
}

std::vector<BenchTest> make_tests(const BenchOptions& options) {
  std::vector<BenchTest> tests;
  const auto check = [](int64_t n, const char* option) {
    if (n < 0 || n > (int64_t{1} << 24)) {
      throw std::invalid_argument(
          std::string(option) + " takes counts of tokens from 0 to 2^24, not " + std::to_string(n));
    }
  };
  for (const int64_t n : options.n_prompt) {
    check(n, "-p");
    if (n > 0 && !options.break_even) tests.push_back({n, 0});
  }
  for (const int64_t batch : options.batches) {
    if (batch < 1 || batch > 4096) {
      throw std::invalid_argument("-b takes numbers of sequences from 1 to 4096, not " +
                                  std::to_string(batch));
    }
  }
  if (options.break_even && options.batches != std::vector<int64_t>{1}) {
    throw std::invalid_argument("--break-even measures one sequence: leave -b out");
  }
  for (const int64_t n : options.n_gen) {
    check(n, "-n");
    for (const int64_t batch : options.batches) {
      if (n > 0) tests.push_back({0, n, batch});
    }
  }
  for (const std::string& text : options.prompt_gen) {
    BenchTest test;
    int end = 0;
    if (std::sscanf(text.c_str(), "%ld,%ld%n", &test.n_prompt, &test.n_gen, &end) != 2 ||
        end != static_cast<int>(text.size())) {
      throw std::invalid_argument("-pg takes PROMPT,GENERATED as in 512,128, not \"" + text + "\"");
    }
    check(test.n_prompt, "-pg");
    check(test.n_gen, "-pg");
    if (!options.break_even) tests.push_back(test);
  }
  for (const int64_t depth : options.depths) check(depth, "-d");
  if (tests.empty()) throw std::invalid_argument("nothing to measure: -p and -n are 0");
  return tests;
}

}  // namespace mustafar::cli
