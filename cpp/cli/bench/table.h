// A benchmark's results and the formats they are written in, named as llama-bench's users know
// them.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace mustafar::cli {

struct BenchRow {
  std::string model;
  int64_t model_size = 0;  // bytes
  int64_t model_n_params = 0;
  std::string backend;  // "cpu", "cuda", "cuda:1"
  std::string device;   // its description
  int n_threads = 0;
  std::string kv;  // "bf16 dense", "int8 K.62 V.75"
  nlohmann::ordered_json kv_config;
  int64_t kv_bytes = 0;        // measured, at the depth, of one sequence
  int64_t kv_dense_bytes = 0;  // the same tokens dense, at 2 bytes a value
  int64_t n_prompt = 0;        // tokens
  int64_t n_gen = 0;
  int64_t n_depth = 0;
  int64_t n_batch = 1;  // sequences together
  std::vector<double> samples_ns;
  double bytes_per_pass = 0;  // what has to be read: by a decode step, or by a prefill call
  double passes = 1;          // of those in one sample
  int64_t working_set = 0;    // bytes that the rotation goes over
  int replicas = 1;
  double read_bandwidth = 0;  // of the machine, bytes/s; 0: not measured

  std::string test() const;  // "pp512", "tg128 @ d4096", "pp512+tg128", "16 x tg128"
  double avg_ns() const;
  double median_ns() const;
  double stddev_ns() const;
  double avg_ts() const;  // tokens per second, mean of the samples' rates
  double stddev_ts() const;
  double bytes_per_second() const;
  nlohmann::ordered_json json() const;
};

// Writes rows as they come. Formats: md, csv, json, jsonl.
class BenchTable {
 public:
  explicit BenchTable(const std::string& format);  // throws std::invalid_argument
  void add(const BenchRow& row);
  void add_extra(const nlohmann::ordered_json& row);  // of another kind, after the rows
  void finish();

 private:
  void add_markdown(const BenchRow& row);
  void add_csv(const nlohmann::ordered_json& row);
  void add_json(const nlohmann::ordered_json& row);

  const std::string format_;
  bool any_ = false;
  bool any_extra_ = false;
};

}  // namespace mustafar::cli
