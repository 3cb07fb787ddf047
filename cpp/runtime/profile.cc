#include "mustafar/profile.h"

#include <cmath>
#include <cstring>
#include <map>
#include <stdexcept>
#include <utility>

#include "core/atomic_file.h"
#include "core/hash.h"
#include "core/json_tree.h"
#include "io/safetensors.h"
#include "mustafar/error.h"
#include "runtime/auto_profile.h"
#include "runtime/model_impl.h"

namespace mustafar {
namespace {

// The largest extent of a tensor in any direction; no model has as many layers, heads or dims.
constexpr uint64_t kLargestExtent = 1 << 20;

constexpr const char* kFormatVersion = "2";
constexpr const char* kFolderProfile = "kv_profile.safetensors";

// The header's __metadata__ object; the reader that validates the file leaves it aside.
std::map<std::string, std::string> metadata_of(const MappedFile& file) {
  uint64_t length = 0;
  std::memcpy(&length, file.data(), 8);
  const char* text = reinterpret_cast<const char*>(file.data()) + 8;
  JsonTree<> tree;
  try {
    tree = parse_json_tree({text, length});
  } catch (const nlohmann::json::exception&) {  // the header has changed since it was read before
    file.check_read();
    throw ModelError(file.path().string() + ": changed while it was read");
  }
  const nlohmann::json& header = *tree;
  std::map<std::string, std::string> out;
  if (header.contains("__metadata__") && header["__metadata__"].is_object()) {
    for (const auto& [key, value] : header["__metadata__"].items()) {
      if (value.is_string()) out[key] = value.get<std::string>();
    }
  }
  return out;
}

std::string shape_text(const std::vector<uint64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); i++) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// The tensors of a profile under their names, in file order.
template <typename Self>
auto tensors_of(Self& profile) {
  return std::vector{
      std::pair{"k_forward", &profile.k_forward}, std::pair{"k_backward", &profile.k_backward},
      std::pair{"v_forward", &profile.v_forward}, std::pair{"v_backward", &profile.v_backward},
      std::pair{"k_weight", &profile.k_weight},   std::pair{"v_weight", &profile.v_weight},
      std::pair{"k_sigma", &profile.k_sigma},     std::pair{"v_sigma", &profile.v_sigma},
      std::pair{"k_cost", &profile.k_cost},       std::pair{"v_cost", &profile.v_cost}};
}

// A positive number per layer, and optional.
bool is_per_layer(const std::string& name) { return name.ends_with("_cost"); }

// A positive number per dim, and optional: no matrix.
bool is_per_dim(const std::string& name) {
  return name.ends_with("_weight") || name.ends_with("_sigma");
}

bool is_optional(const std::string& name) { return is_per_dim(name) || is_per_layer(name); }

// The extents of a tensor. matrix: those of the matrices, [n_layers, n_kv_heads, D, D].
template <typename Shape>
Shape shape_of(const std::string& name, Shape matrix) {
  matrix.resize(is_per_layer(name) ? 1 : is_per_dim(name) ? 3 : 4);
  return matrix;
}

std::string hash_of(const Profile& profile, bool costs) {
  Hash64 hash;
  hash.add(profile.kind);
  for (const auto& [name, values] : tensors_of(profile)) {
    // A profile without costs keeps the hash that it had before profiles had costs.
    if (is_per_layer(name) && (!costs || values->empty())) continue;
    hash.add(name);
    hash.add_int(static_cast<int64_t>(values->size()));
    hash.add(values->data(), values->size() * sizeof(float));
  }
  return hash.hex();
}

}  // namespace

std::shared_ptr<const Profile> Profile::load(const std::filesystem::path& path) {
  const SafetensorsFile file = SafetensorsFile::open(path);
  const std::string where = path.string() + ": ";
  auto profile = std::make_shared<Profile>();
  const auto metadata = metadata_of(file.file);
  const auto meta = [&](const char* key) {
    const auto found = metadata.find(key);
    if (found == metadata.end()) {
      throw ModelError(where + "metadata has no \"" + key + "\": not a KV profile");
    }
    return found->second;
  };
  if (meta("format_version") != kFormatVersion) {
    throw ModelError(where + "profile format version " + meta("format_version") +
                     ", this build reads version " + kFormatVersion +
                     ": calibrate again (mustafar calibrate)");
  }
  profile->kind = meta("kind");
  profile->model_fingerprint = meta("model_fingerprint");
  profile->text_hash = meta("text_hash");

  const auto find = [&](const std::string& name) -> const SafetensorsEntry* {
    for (const SafetensorsEntry& entry : file.entries) {
      if (entry.name == name) return &entry;
    }
    return nullptr;
  };
  const SafetensorsEntry* first = find("k_forward");
  if (first == nullptr || first->shape.size() != 4 || first->shape[2] != first->shape[3]) {
    throw ModelError(where + "tensor k_forward is missing or is not [layers, kv_heads, D, D]");
  }
  for (uint64_t extent : first->shape) {
    if (extent > kLargestExtent)
      throw ModelError(where + "k_forward has shape " + shape_text(first->shape));
  }
  profile->n_layers = static_cast<int32_t>(first->shape[0]);
  profile->n_kv_heads = static_cast<int32_t>(first->shape[1]);
  profile->head_dim = static_cast<int32_t>(first->shape[2]);
  for (auto [name, values] : tensors_of(*profile)) {
    const SafetensorsEntry* entry = find(name);
    if (entry == nullptr) {
      if (is_optional(name)) continue;
      throw ModelError(where + "tensor " + name + " is missing");
    }
    const std::vector<uint64_t> expected = shape_of(name, first->shape);
    if (entry->shape != expected || std::strcmp(entry->dtype, "F32") != 0) {
      throw ModelError(where + "tensor " + name + " is " + entry->dtype + " " +
                       shape_text(entry->shape) + ", expected F32 " + shape_text(expected));
    }
    values->resize((entry->end - entry->begin) / 4);
    std::memcpy(values->data(), file.file.data() + entry->begin, values->size() * 4);
    for (float x : *values) {
      if (!std::isfinite(x) || (is_optional(name) && x <= 0)) {
        throw ModelError(where + "tensor " + name + " holds the value " + std::to_string(x));
      }
    }
  }
  file.file.check_read();
  return profile;
}

void Profile::save(const std::filesystem::path& path) const {
  JsonObjectText metadata, header;
  metadata.add("format_version", kFormatVersion);
  metadata.add("kind", kind);
  metadata.add("model_fingerprint", model_fingerprint);
  metadata.add("text_hash", text_hash);
  header.add_text("__metadata__", metadata.take());
  uint64_t at = 0;
  for (const auto& [name, values] : tensors_of(*this)) {
    if (values->empty()) continue;
    const std::vector<uint64_t> extents =
        shape_of(name, std::vector<uint64_t>{uint64_t(n_layers), uint64_t(n_kv_heads),
                                             uint64_t(head_dim), uint64_t(head_dim)});
    JsonListText shape, offsets;
    for (const uint64_t extent : extents) shape.add_text(std::to_string(extent));
    for (const uint64_t offset : {at, at + values->size() * 4}) {
      offsets.add_text(std::to_string(offset));
    }
    JsonObjectText tensor;
    tensor.add("dtype", "F32");
    tensor.add_text("shape", shape.take());
    tensor.add_text("data_offsets", offsets.take());
    header.add_text(name, tensor.take());
    at += values->size() * 4;
  }
  std::string text = header.take();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const uint64_t length = text.size();
  AtomicFile file(path);
  file.write(&length, 8);
  file.write(text.data(), text.size());
  for (const auto& [name, values] : tensors_of(*this))
    file.write(values->data(), values->size() * 4);
  file.commit();
}

std::shared_ptr<const Profile> Profile::hadamard(const ModelConfig& config) {
  auto profile = std::make_shared<Profile>();
  const int32_t d = config.head_dim;
  profile->n_layers = config.n_layers;
  profile->n_kv_heads = config.n_kv_heads;
  profile->head_dim = d;
  profile->kind = "hadamard";
  const int32_t block = d & -d;  // the largest power of two that divides d
  std::vector<float> matrix(int64_t{d} * d, 0.0f);
  const float scale = 1.0f / std::sqrt(static_cast<float>(block));
  for (int32_t i = 0; i < d; i++) {
    for (int32_t j = i / block * block; j < i / block * block + block; j++) {
      const bool odd = __builtin_parity((i % block) & (j % block));
      matrix[int64_t{i} * d + j] = odd ? -scale : scale;
    }
  }
  std::vector<float> all;
  for (int32_t i = 0; i < config.n_layers * config.n_kv_heads; i++) {
    all.insert(all.end(), matrix.begin(), matrix.end());
  }
  // Symmetric and orthogonal: its own inverse.
  profile->k_forward = profile->k_backward = profile->v_forward = profile->v_backward = all;
  return profile;
}

std::shared_ptr<const Profile> Profile::resolve(const std::string& name, const Model& model,
                                                const ProfileHooks& hooks, bool costs) {
  if (name.empty() || name == "none") return nullptr;
  if (name == "hadamard") return model.impl()->hadamard_profile();
  if (name == "auto") return auto_profile(model, hooks, costs);
  if (name == "model") return load(model.folder() / kFolderProfile);
  return load(name);
}

std::string Profile::hash() const { return hash_of(*this, true); }
std::string Profile::transform_hash() const { return hash_of(*this, false); }

void Profile::check(const ModelConfig& config, const std::string& fingerprint) const {
  const auto expect = [](const char* what, int32_t mine, int32_t models) {
    if (mine != models) {
      throw ModelError(std::string("the profile has ") + what + " " + std::to_string(mine) +
                       ", the model " + std::to_string(models));
    }
  };
  expect("n_layers", n_layers, config.n_layers);
  expect("n_kv_heads", n_kv_heads, config.n_kv_heads);
  expect("head_dim", head_dim, config.head_dim);
  if (!model_fingerprint.empty() && model_fingerprint != fingerprint) {
    throw ModelError("the profile was calibrated for the model with fingerprint " +
                     model_fingerprint + ", this model's is " + fingerprint);
  }
  const size_t heads = size_t(n_layers) * n_kv_heads, square = heads * head_dim * head_dim;
  for (const auto& [name, values] : tensors_of(*this)) {
    const size_t expected = is_per_layer(name) ? size_t(n_layers)
                            : is_per_dim(name) ? heads * head_dim
                                               : square;
    if (values->size() != expected && !(is_optional(name) && values->empty())) {
      throw ModelError(std::string("the profile's ") + name + " has " +
                       std::to_string(values->size()) + " values, expected " +
                       std::to_string(expected));
    }
  }
}

}  // namespace mustafar
