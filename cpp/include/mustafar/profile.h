// A calibrated KV transform: per layer and KV head an invertible pair of D x D matrices for keys
// and one for values, under which pruning costs less. Row vectors: k' = k F_k, q' = q B_k^T, v' = v
// F_v, o = o' B_v, with F B = I. A safetensors file on disk.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "mustafar/model.h"

namespace mustafar {

// What a caller may hear of while a profile is made; any may be null.
struct ProfileHooks {
  // Tokens done and in all, now and then; what it throws ends the work and leaves nothing behind.
  std::function<void(int64_t done, int64_t total)> progress = {};
  std::function<void(const std::string& line)> note = {};     // a calibration begins, and why
  std::function<void(const std::string& line)> warning = {};  // its profile could not be kept
};

class Profile {
 public:
  int32_t n_layers = 0;
  int32_t n_kv_heads = 0;
  int32_t head_dim = 0;
  std::string kind;               // "hadamard", "klt", "balanced"
  std::string model_fingerprint;  // of the model it was calibrated for; empty: any of these shapes
  std::string text_hash;          // of the calibration text; empty for hadamard

  // [n_layers][n_kv_heads][head_dim][head_dim], F and B as above. Columns of a calibrated F stand
  // by falling energy.
  std::vector<float> k_forward, k_backward, v_forward, v_backward;
  // [n_layers][n_kv_heads][head_dim] ranking weights > 0, or empty for none.
  std::vector<float> k_weight, v_weight;
  // [n_layers][n_kv_heads][head_dim] root mean squares of k' and v' over the calibration text, or
  // empty where there was none (hadamard). A dim that carries nothing has kLeastSigma of its head's
  // largest: values are > 0.
  std::vector<float> k_sigma, v_sigma;
  static constexpr float kLeastSigma = 1e-6f;
  // [n_layers] what errors cost, > 0, or empty where it was not measured: divergence from the dense
  // cache in nats a token, per unit of expected square error of k' and v' (before they were scaled
  // by weights), summed over a row's dims and the layer's KV heads.
  std::vector<float> k_cost, v_cost;
  bool has_costs() const { return !k_cost.empty() && !v_cost.empty(); }

  // Throws ModelError naming file, tensor, expected and actual.
  static std::shared_ptr<const Profile> load(const std::filesystem::path& file);
  void save(const std::filesystem::path& file) const;  // written aside, then renamed

  // Rotation by the normalised Hadamard matrix (head_dim a power of two; else blocks of the largest
  // power of two that divides it). Needs no calibration.
  static std::shared_ptr<const Profile> hadamard(const ModelConfig& config);

  // "" or "none": null; "hadamard"; "model": kv_profile.safetensors in the model's folder; "auto":
  // calibrated on the model (which needs its tokenizer, else TokenizerError) with a text that ships
  // with the library, the first time; kept in $XDG_CACHE_HOME (~/.cache)/mustafar/profiles;
  // otherwise a file. costs: the setting asks for a budget, so that "auto" has to have k_cost and
  // v_cost: measured the first time, and kept along.
  static std::shared_ptr<const Profile> resolve(const std::string& name, const Model& model,
                                                const ProfileHooks& hooks = {}, bool costs = false);

  // Of everything that changes results: 16 hex digits.
  std::string hash() const;
  std::string transform_hash() const;  // of all but the costs: what counts without a budget
  // Throws ModelError where the profile does not fit the model.
  void check(const ModelConfig& config, const std::string& fingerprint) const;
};

}  // namespace mustafar
