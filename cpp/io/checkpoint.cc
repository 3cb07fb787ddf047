#include "io/checkpoint.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "io/json_file.h"
#include "io/model_config.h"
#include "io/quantised/readers.h"
#include "mustafar/error.h"

namespace mustafar {
namespace {

constexpr size_t kIndexCap = 64 << 20;  // bytes
constexpr const char* kEmbeddingModule = "model.embed_tokens";
constexpr const char* kLmHeadModule = "lm_head";
constexpr const char* kEmbedding = "model.embed_tokens.weight";
constexpr const char* kLmHead = "lm_head.weight";

bool is_there(const std::filesystem::path& path) {
  std::error_code ignored;
  return std::filesystem::exists(std::filesystem::symlink_status(path, ignored));
}

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

// Tables that older exports saved although they follow from the config.
bool is_harmless(std::string_view name) {
  return ends_with(name, ".rotary_emb.inv_freq") || ends_with(name, ".rotary_emb.cos_cached") ||
         ends_with(name, ".rotary_emb.sin_cached");
}

// Of quantised modules: how activations would be rounded, which they are not here.
bool is_of_activations(std::string_view name) {
  return ends_with(name, ".input_scale") || ends_with(name, ".input_zero_point") ||
         ends_with(name, ".activation_scale");
}

template <typename Shape>
std::string shape_text(const Shape& shape) {
  std::string text = "[";
  for (const auto dim : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(dim);
  return text + "]";
}

template <typename A, typename B>
bool same_shape(const A& a, const B& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](auto x, auto y) {
    return static_cast<uint64_t>(x) == static_cast<uint64_t>(y);
  });
}

// False for types of the safetensors format that the runtime does not have.
bool to_dtype(std::string_view name, DType& dtype) {
  if (name == "F32")
    dtype = DType::kF32;
  else if (name == "F16")
    dtype = DType::kF16;
  else if (name == "BF16")
    dtype = DType::kBF16;
  else
    return false;
  return true;
}

// A shard is a plain file name: nothing in an index may lead out of the folder. The file itself may
// be a symbolic link, as in model caches; MappedFile refuses all but regular files behind it.
bool is_plain_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." &&
         name.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos;
}

}  // namespace

Checkpoint Checkpoint::open(const std::filesystem::path& folder) {
  std::error_code ignored;
  if (!std::filesystem::is_directory(folder, ignored)) {
    throw ModelError(folder.string() + ": expected a model folder, found " +
                     (is_there(folder) ? "something else" : "nothing there"));
  }
  Checkpoint checkpoint;
  checkpoint.folder_ = folder;
  checkpoint.config_ = read_model_config(folder);
  checkpoint.quantisation_ = read_quantisation(folder);
  checkpoint.open_files();
  checkpoint.take_all(checkpoint.index_tensors());
  return checkpoint;
}

void Checkpoint::open_files() {
  const std::filesystem::path single = folder_ / "model.safetensors";
  const std::filesystem::path index = folder_ / "model.safetensors.index.json";
  if (is_there(single)) {
    files_.push_back(SafetensorsFile::open(single));
  } else if (is_there(index)) {
    open_shards(index);
  } else {
    const char* hint = is_there(folder_ / "pytorch_model.bin") ||
                               is_there(folder_ / "pytorch_model.bin.index.json")
                           ? " (pytorch_model.bin is not read: save the model as safetensors)"
                           : "";
    throw ModelError(folder_.string() +
                     ": expected model.safetensors or model.safetensors.index.json, found neither" +
                     hint);
  }
}

void Checkpoint::open_shards(const std::filesystem::path& index) {
  const JsonTree<> object = read_json_file(index, kIndexCap);
  const auto fail = [&](const std::string& what) {
    throw ModelError(index.string() + ": \"weight_map\"" + what);
  };
  const auto map = object->find("weight_map");
  if (map == object->end()) fail(" is missing");
  if (!map->is_object()) fail(": expected an object, found " + describe(*map));

  std::set<std::string> shards;
  for (const auto& [tensor, shard] : map->items()) {
    if (!shard.is_string() || !is_plain_name(shard.get_ref<const std::string&>())) {
      fail(", tensor " + nlohmann::json(tensor).dump() +
           ": expected the name of a file in the folder, found " + describe(shard));
    }
    shards.insert(shard.get<std::string>());
  }
  // The index says which files to open; what they hold, they say themselves. Indexes are copied
  // from export to export, and name a tied head that no file has.
  for (const std::string& shard : shards) {
    if (!is_there(folder_ / shard)) {
      fail(": names the shard " + nlohmann::json(shard).dump() + ", which is not in the folder");
    }
    files_.push_back(SafetensorsFile::open(folder_ / shard));
  }
}

Checkpoint::Sources Checkpoint::index_tensors() const {
  Sources sources;
  for (const SafetensorsFile& file : files_) {
    for (const SafetensorsEntry& entry : file.entries) {
      const auto [at, added] = sources.try_emplace(entry.name, Source{&file, &entry});
      if (!added) {
        throw ModelError(file.file.path().string() + ": tensor " +
                         nlohmann::json(entry.name).dump() + " is also in " +
                         at->second.file->file.path().string());
      }
    }
  }
  return sources;
}

// Moves a tensor that the config calls for from sources to the table.
void Checkpoint::take(Sources& sources, const std::string& name, std::vector<int64_t> shape) {
  const auto found = sources.find(name);
  if (found == sources.end()) {
    throw ModelError(folder_.string() + ": tensor \"" + name + "\" is missing; expected shape " +
                     shape_text(shape));
  }
  const auto& [file, entry] = found->second;
  const std::string where = file->file.path().string() + ": tensor \"" + name + "\": ";
  TensorView view;
  if (!to_dtype(entry->dtype, view.dtype)) {
    throw ModelError(where + "expected dtype F32, F16 or BF16, found " + entry->dtype);
  }
  if (!same_shape(shape, entry->shape)) {
    throw ModelError(where + "expected shape " + shape_text(shape) + ", found " +
                     shape_text(entry->shape));
  }
  view.shape = std::move(shape);
  view.data = file->file.data() + entry->begin;
  view.bytes = static_cast<int64_t>(entry->end - entry->begin);
  view.file = &file->file.path();
  if (entry->begin % static_cast<uint64_t>(dtype_bytes(view.dtype, 1)) != 0) {
    file->file.prefault(entry->begin, entry->end);
    aligned_.emplace_back(static_cast<size_t>(view.bytes));
    std::memcpy(aligned_.back().data(), view.data, static_cast<size_t>(view.bytes));
    view.data = aligned_.back().data();
  }
  total_bytes_ += view.bytes;
  const auto at = tensors_.emplace(name, std::move(view)).first;
  at->second.name = at->first;
  sources.erase(found);
}

void Checkpoint::take_matrix(Sources& sources, const std::string& module, int64_t rows,
                             int64_t cols) {
  const auto find = [&](const std::string& name, StoredPart& part) {
    const auto found = sources.find(name);
    if (found == sources.end()) return false;
    const auto& [file, entry] = found->second;
    part = {name,
            entry->dtype,
            {entry->shape.begin(), entry->shape.end()},
            file->file.data() + entry->begin,
            static_cast<int64_t>(entry->end - entry->begin),
            &file->file};
    return true;
  };
  ModuleTensors tensors(folder_.string(), module, find);
  std::unique_ptr<StoredMatrix> matrix =
      read_stored_matrix(quantisation_, {rows, cols}, model_dtype(), tensors);
  if (matrix == nullptr) {
    for (const char* suffix : {"weight_packed", "qweight"}) {
      if (!tensors.has(suffix)) continue;
      tensors.fail(tensors.take(suffix),
                   quantisation_.method == Quantisation::Method::kNone
                       ? "config.json has no \"quantization_config\" that says how it is quantised"
                       : "is none of the method " + quantisation_.name());
    }
    return take(sources, module + ".weight", {rows, cols});
  }
  for (const StoredPart& part : matrix->parts) {
    total_bytes_ += part.bytes;
    sources.erase(part.name);
  }
  quantised_.emplace(module + ".weight", std::move(matrix));
}

void Checkpoint::take_all(Sources sources) {
  const int64_t hidden = config_.hidden_size, intermediate = config_.intermediate_size;
  const int64_t vocab = config_.vocab_size;
  const FamilyTraits& traits = config_.traits;
  const int64_t q_rows = int64_t{config_.n_heads} * config_.head_dim;
  const int64_t kv_rows = int64_t{config_.n_kv_heads} * config_.head_dim;

  const auto has_matrix = [&](const std::string& module) {
    return sources.count(module + ".weight") > 0 || sources.count(module + ".weight_packed") > 0 ||
           sources.count(module + ".qweight") > 0;
  };
  const bool has_embedding = has_matrix(kEmbeddingModule), has_head = has_matrix(kLmHeadModule);
  config_.tie_word_embeddings = !(has_embedding && has_head);
  if (has_embedding || !has_head) take_matrix(sources, kEmbeddingModule, vocab, hidden);
  if (has_head) take_matrix(sources, kLmHeadModule, vocab, hidden);
  take(sources, "model.norm.weight", {hidden});

  for (int32_t i = 0; i < config_.n_layers; i++) {
    const std::string layer = "model.layers." + std::to_string(i) + ".";
    const auto linear = [&](const char* name, int64_t rows, int64_t cols, bool bias) {
      take_matrix(sources, layer + name, rows, cols);
      if (bias) take(sources, layer + name + ".bias", {rows});
    };
    const char* other = traits.norm_after ? "post_feedforward_layernorm" : "input_layernorm";
    take(sources, layer + other + ".weight", {hidden});
    take(sources, layer + "post_attention_layernorm.weight", {hidden});
    if (traits.fused_projections) {
      linear("self_attn.qkv_proj", q_rows + 2 * kv_rows, hidden, false);
      linear("mlp.gate_up_proj", 2 * intermediate, hidden, false);
    } else {
      linear("self_attn.q_proj", q_rows, hidden, config_.qkv_bias);
      linear("self_attn.k_proj", kv_rows, hidden, config_.qkv_bias);
      linear("self_attn.v_proj", kv_rows, hidden, config_.qkv_bias);
      linear("mlp.gate_proj", intermediate, hidden, config_.mlp_bias);
      linear("mlp.up_proj", intermediate, hidden, config_.mlp_bias);
    }
    linear("self_attn.o_proj", hidden, q_rows, config_.o_bias);
    linear("mlp.down_proj", hidden, intermediate, config_.mlp_bias);
    if (traits.qk_norm != QkNorm::kNone) {
      const bool whole = traits.qk_norm == QkNorm::kProjection;
      take(sources, layer + "self_attn.q_norm.weight", {whole ? q_rows : config_.head_dim});
      take(sources, layer + "self_attn.k_norm.weight", {whole ? kv_rows : config_.head_dim});
    }
  }

  check_rest(sources);
}

// What is left would change the result if it belonged to the model: it must be known not to.
void Checkpoint::check_rest(const Sources& sources) const {
  for (const auto& [name, source] : sources) {
    if (is_harmless(name)) continue;
    const std::string module = name.substr(0, name.rfind('.'));
    if (find_quantised(module + ".weight") != nullptr) {
      if (is_of_activations(name)) continue;
      // AutoGPTQ wrote a bias of zeros for matrices that have none.
      if (ends_with(name, ".bias") && is_zero(source)) continue;
    }
    throw ModelError(source.file->file.path().string() + ": tensor " + nlohmann::json(name).dump() +
                     " is not part of the model that config.json describes");
  }
}

bool Checkpoint::is_zero(const Source& source) {
  const auto& [file, entry] = source;
  file->file.prefault(entry->begin, entry->end);
  return std::all_of(file->file.data() + entry->begin, file->file.data() + entry->end,
                     [](uint8_t byte) { return byte == 0; });
}

const StoredMatrix* Checkpoint::find_quantised(std::string_view name) const {
  const auto found = quantised_.find(name);
  return found == quantised_.end() ? nullptr : found->second.get();
}

DType Checkpoint::model_dtype() const {
  if (config_.torch_dtype == "float32") return DType::kF32;
  return config_.torch_dtype == "float16" ? DType::kF16 : DType::kBF16;
}

void Checkpoint::for_each_quantised(
    const std::function<void(const std::string&, const StoredMatrix&)>& visit) const {
  for (const auto& [name, matrix] : quantised_) visit(name, *matrix);
}

const TensorView* Checkpoint::find(std::string_view name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

const TensorView& Checkpoint::require(std::string_view name,
                                      std::initializer_list<int64_t> shape) const {
  const TensorView* view = find(name);
  if (view == nullptr) {
    throw ModelError(folder_.string() + ": tensor \"" + std::string(name) +
                     "\" is missing; expected shape " + shape_text(shape));
  }
  if (!same_shape(shape, view->shape)) {
    throw ModelError(view->file->string() + ": tensor \"" + std::string(name) +
                     "\": expected shape " + shape_text(shape) + ", found " +
                     shape_text(view->shape));
  }
  return *view;
}

const TensorView& Checkpoint::embedding() const {
  const TensorView* view = find(kEmbedding);
  return view != nullptr ? *view : *find(kLmHead);
}

const TensorView& Checkpoint::lm_head() const {
  const TensorView* view = find(kLmHead);
  return view != nullptr ? *view : *find(kEmbedding);
}

void Checkpoint::for_each(const std::function<void(const TensorView&)>& visit) const {
  for (const auto& [name, view] : tensors_) visit(view);
}

void Checkpoint::load_all(const std::function<void(int64_t, int64_t)>& progress) const {
  constexpr size_t kStep = 16 << 20;  // bytes between two calls of progress
  size_t total = 0, done = 0;
  for (const SafetensorsFile& file : files_) total += file.file.bytes();
  for (const SafetensorsFile& file : files_) {
    file.file.will_need();
    for (size_t at = 0; at < file.file.bytes(); at += kStep) {
      const size_t end = std::min(at + kStep, file.file.bytes());
      file.file.prefault(at, end);
      done += end - at;
      if (progress) progress(static_cast<int64_t>(done), static_cast<int64_t>(total));
    }
  }
}

const MappedFile* Checkpoint::file_of(const void* data) const {
  const uint8_t* const at = static_cast<const uint8_t*>(data);
  for (const SafetensorsFile& file : files_) {
    const uint8_t* const begin = file.file.data();
    if (!std::less<>()(at, begin) && std::less<>()(at, begin + file.file.bytes())) {
      return &file.file;
    }
  }
  return nullptr;
}

void Checkpoint::prefault(const void* data, int64_t bytes) const {
  if (const MappedFile* file = file_of(data)) {
    const size_t offset = static_cast<size_t>(static_cast<const uint8_t*>(data) - file->data());
    file->prefault(offset, offset + static_cast<size_t>(bytes));
  }
}

void Checkpoint::release(const void* data, int64_t bytes) const {
  if (const MappedFile* file = file_of(data)) {
    const size_t offset = static_cast<size_t>(static_cast<const uint8_t*>(data) - file->data());
    file->release(offset, offset + static_cast<size_t>(bytes));
  }
}

void Checkpoint::check_read() const {
  for (const SafetensorsFile& file : files_) file.file.check_read();
}

void Checkpoint::verify() const {
  for (const SafetensorsFile& file : files_) file.file.verify();
}

}  // namespace mustafar
