// What a benchmark is to measure: the options of `mustafar bench` and the tests they stand for.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "mustafar/kv_config.h"

namespace mustafar::cli {

struct BenchOptions {
  std::vector<std::string> models;
  std::vector<std::string> shapes;
  std::string device = "auto";
  std::string dtype = "auto";
  std::string weights = "auto";
  std::vector<int32_t> threads = {0};
  std::vector<int64_t> n_prompt = {512};
  std::vector<int64_t> n_gen = {128};
  std::vector<std::string> prompt_gen;  // "512,128"
  std::vector<int64_t> depths;
  std::vector<int64_t> batches = {1};
  int32_t repetitions = 5;
  std::string format = "md";
  std::vector<std::string> presets;                    // instead of the two lists below
  std::vector<std::string> sparsities = {"0", "0.5"};  // "S", or "K/V"
  std::vector<std::string> kv_dtypes = {"auto"};
  std::string pattern = "group";
  int32_t window = KVConfig().window;
  int32_t sinks = 0;
  std::string profile;
  std::string fill = "random";
  bool no_warmup = false;
  bool no_rotate = false;
  bool break_even = false;
  bool json = false;
};

struct BenchTest {
  int64_t n_prompt = 0;
  int64_t n_gen = 0;
  int64_t n_batch = 1;  // sequences that decode together, each n_gen tokens
};

struct BenchSetting {
  std::string name;
  KVConfig config;  // but for the profile
  std::string profile = "none";
  bool dense = false;  // the one that break-even compares with
};

// The presets, or every sparsity with every value dtype; with break_even the dense cache among
// them. Throws std::invalid_argument naming the option.
std::vector<BenchSetting> make_settings(const BenchOptions& options);
// Prefill, decode and both, decode for every number of sequences; with break_even decode alone.
// Throws std::invalid_argument.
std::vector<BenchTest> make_tests(const BenchOptions& options);

}  // namespace mustafar::cli
