// Models and filled sessions for benchmarks.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "model/llama.h"
#include "model/weights.h"
#include "mustafar/kv_config.h"
#include "mustafar/model.h"
#include "mustafar/session.h"

namespace mustafar::cli {

// A model with a number of threads, as often as it takes to keep what one step reads out of the
// caches: replicas have their own copy of the weights.
class Engine {
 public:
  Engine(std::string name, const ModelConfig& config, std::shared_ptr<const TensorSource> source,
         const ModelOptions& options);

  const std::string& name() const { return name_; }
  const ModelConfig& config() const { return config_; }
  const ModelOptions& options() const { return options_; }
  const Model& model(int replica = 0);  // made on first use
  int64_t parameters();
  int64_t stored_bytes();
  int64_t bytes_read_per_step();  // of weights, by a decode step

 private:
  std::string name_;
  ModelConfig config_;
  std::shared_ptr<const TensorSource> source_;
  ModelOptions options_;
  std::vector<Model> models_;
};

// Appends n tokens with random keys and values to sessions of one model and configuration, to each
// the same, compressed as those of a prompt are, but without running the model: what a deep context
// costs does not depend on it.
void fill_sessions(std::span<Session> sessions, int64_t n, uint64_t seed);

// A greedy decode step of sessions of one model, as an engine makes it: where the device finds the
// largest logit itself, only that leaves it. The sessions' lists of tokens do not grow with it.
class BatchStep {
 public:
  explicit BatchStep(const Model& model);
  void run(std::span<Session> sessions, int32_t token);

 private:
  std::shared_ptr<Model::Impl> engine_;
  ForwardBuffers buffers_;
  std::vector<float> logits_;  // [sessions][vocab], where they all come to the host
};

// Bytes of the cache that a decode step reads.
int64_t cache_bytes_read(const Session& session);

}  // namespace mustafar::cli
