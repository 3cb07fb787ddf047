// A model loaded from a Hugging Face folder. Shared by any number of sessions and threads.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "mustafar/kv_config.h"
#include "mustafar/model_config.h"
#include "mustafar/sampling.h"
#include "mustafar/tokenizer.h"

namespace mustafar {

struct ModelOptions {
  // "cpu"; "cuda:1", a GPU by its number, from 0 among those that CUDA_VISIBLE_DEVICES leaves;
  // "cuda", the first; or "auto": the first where there is one that this build has code for, else
  // the CPU. Throws DeviceError where a GPU asked for can't be had, std::invalid_argument for
  // another name.
  std::string device = "auto";
  std::string dtype = "auto";  // "auto": as stored; "f32", "f16", "bf16": arithmetic and tail type
  // What matrices are in memory. "auto": as stored; "int8", "int4": rounded on loading, with a
  // scale and a minimum for every 32 inputs, the embedding and the head to int8. With another group
  // as in "int4:64", "int8:128" or "int8:row". On the CPU and on GPUs; on the CPU decode rounds
  // activations, too, unless dtype is f32: to int8 beside int4 weights, else to 15 bits. A folder
  // that is quantised already is read as it is with "auto"; where it keeps integers in memory,
  // another type is a std::invalid_argument.
  std::string weights = "auto";
  int32_t threads = 0;    // 0: MUSTAFAR_THREADS, or as many as cores and CPU quota allow
  int64_t kv_budget = 0;  // bytes that all sessions' caches together may take; 0: no limit
  // Called while weights are read (or uploaded, on a GPU): bytes done, bytes in all. What it throws
  // ends the loading.
  std::function<void(int64_t done, int64_t total)> progress = {};
};

struct ModelMemory {
  int64_t weights_bytes = 0;    // tensors: mapped, uploaded or quantised
  int64_t workspace_bytes = 0;  // activations and scratch
  int64_t kv_bytes = 0;         // allocated by all sessions' caches
  // The most that kv_bytes ever was, one layer of a prompt's dense keys and values included.
  int64_t kv_peak_bytes = 0;
  int64_t kv_budget = 0;  // 0: no limit
};

// A text, or token ids (to which nothing is added).
using Prompt = std::variant<std::string, std::vector<int32_t>>;

struct BatchOptions {
  int32_t max_batch = 64;      // sequences that decode together
  bool parse_special = false;  // special tokens spelled in a text become those tokens
  // Asked between the parts of the work; throwing from it stops the call.
  std::function<void()> interrupt_check = {};
};

class Model {
 public:
  // A model folder, or the id of a repository that is in the local Hugging Face cache (hub.h).
  // Throws ModelError, TokenizerError, DeviceError, OutOfMemory or std::invalid_argument.
  static Model load(const std::filesystem::path& folder, const ModelOptions& options = {});

  const ModelConfig& config() const;
  // What is used where a caller says nothing: the folder's, or the library's own.
  SamplingParams default_sampling() const;
  bool has_tokenizer() const;
  const Tokenizer& tokenizer() const;  // throws TokenizerError where the folder has none
  const std::filesystem::path& folder() const;
  std::string device() const;              // "cpu", "cuda" (the first GPU) or "cuda:1"
  std::string dtype() const;               // "f32", "f16" or "bf16"
  std::string weights() const;             // as asked for, with the group: "auto", "int4:32"
  std::string device_description() const;  // the instruction set in use, threads
  // Of config, tensor table and sampled bytes: 16 hex digits.
  const std::string& fingerprint() const;
  ModelMemory memory() const;

  // Continues every prompt, many at a time (continuous batching); results in the prompts' order and
  // independent of the batch, as Engine's are. A failing prompt fails the call.
  std::vector<GenerateResult> generate(std::span<const Prompt> prompts,
                                       const SamplingParams& params = {}, const KVConfig& kv = {},
                                       const BatchOptions& options = {}) const;

  // The same, each prompt with its own parameters. Throws std::invalid_argument unless there are as
  // many of them.
  std::vector<GenerateResult> generate(std::span<const Prompt> prompts,
                                       std::span<const SamplingParams> params,
                                       const KVConfig& kv = {},
                                       const BatchOptions& options = {}) const;

  // Drops the handle's weights once the last session is gone. Using a closed handle throws
  // StateError.
  void close();

  // For the library itself.
  struct Impl;
  explicit Model(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
  const std::shared_ptr<Impl>& impl() const;

 private:
  std::shared_ptr<Impl> impl_;
};

}  // namespace mustafar
