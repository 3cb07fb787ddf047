// What a Model holds, for the library's own use.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "core/fork.h"
#include "kv/block_pool.h"
#include "kv/sequence_cache.h"
#include "model/llama.h"
#include "model/weights.h"
#include "mustafar/model.h"
#include "mustafar/profile.h"

namespace mustafar {

struct Model::Impl {
  // Members are destroyed from the last up: pools before the backend, weights before their source.
  std::filesystem::path folder;
  ModelConfig config;
  std::shared_ptr<const TensorSource> source;
  std::unique_ptr<Backend> backend;
  DType dtype = DType::kF32;  // arithmetic and tail
  WeightFormat weight_format;
  LoadedWeights weights;
  std::optional<Tokenizer> tokenizer;
  std::string tokenizer_error;  // why there is none
  std::shared_ptr<KVBudget> budget;
  std::unique_ptr<Llama> llama;
  std::string fingerprint;  // of config, tensor table and sampled bytes: 16 hex digits

  // One pool per size of pages in use; pools go with their last sequence.
  std::shared_ptr<BlockPool> pool(int64_t page_bytes);
  // Profile::hadamard of this model, made once.
  std::shared_ptr<const Profile> hadamard_profile();
  // A profile's products (null: none) and the stored order on this model's device, uploaded once
  // for each in use and kept until another one is asked for; null where rows stay as they are.
  std::shared_ptr<const KVTransform> transform(const std::shared_ptr<const Profile>& profile,
                                               int32_t k_groups, int32_t v_groups);
  // rows: see make_cache_spec. Throws as that does, and DeviceError for a budget where the device
  // needs layers to be alike.
  std::shared_ptr<const CacheSpec> cache_spec(const KVConfig& kv, const RowSizes* rows = nullptr);
  // What a configuration's budget deals to the layers, dealt once for each profile in use. Throws
  // as deal_rows.
  std::shared_ptr<const RowSizes> row_budget(const KVConfig& kv);
  // Tables of coded rows, from the sigmas of a profile that fits the model and the layout's sizes
  // of rows, made once for those in use and kept likewise; null where rows are not coded. Throws
  // std::invalid_argument where the profile has no sigmas, DeviceError where the device has no
  // kernels for them.
  std::shared_ptr<const CodeTables> code_tables(const KVConfig& kv, const StoreLayout& layout);
  // Of a sequence of at most max_tokens: longrope chooses its frequencies by that.
  bool long_rope(int64_t max_tokens) const {
    return config.has_long_rope() && max_tokens > config.rope_original_context;
  }
  SequenceCache new_cache(std::shared_ptr<const CacheSpec> spec, int64_t max_tokens);

  LongMutex auto_profile_mutex{
      "the model's automatic KV profile was being made by another thread when this process was "
      "forked: pass a profile, or load the model here"};
  std::shared_ptr<const Profile> auto_profile;  // of profile="auto", once asked for

  std::atomic<int64_t> workspace_bytes{0};  // of all sessions, as they count it

 private:
  ForkSafeMutex mutex_;
  std::vector<std::pair<int64_t, std::weak_ptr<BlockPool>>> pools_;
  struct KnownTransform {
    std::weak_ptr<const Profile> profile;
    std::weak_ptr<const KVTransform> transform;
  };
  std::vector<KnownTransform> transforms_;
  std::shared_ptr<const Profile> hadamard_;  // once asked for
  // The newest of a profile, for the next session of its setting: uploading takes milliseconds.
  std::shared_ptr<const KVTransform> last_transform_;
  std::shared_ptr<const CodeTables> last_codes_;
  struct Codes {
    std::weak_ptr<const Profile> profile;
    std::vector<int32_t> row_bytes;  // [n_layers][2 (K, V)]
    std::weak_ptr<const CodeTables> tables;
  };
  std::vector<Codes> codes_;
  struct Budget {
    std::weak_ptr<const Profile> profile;
    std::optional<double> bytes_per_token, max_kld;
    std::shared_ptr<const RowSizes> rows;
  };
  std::vector<Budget> budgets_;
};

// A model over tensors from anywhere: what load() ends in, and benchmarks with random weights.
Model make_model(const ModelConfig& config, std::shared_ptr<const TensorSource> source,
                 const ModelOptions& options, const std::filesystem::path& folder = {});

}  // namespace mustafar
