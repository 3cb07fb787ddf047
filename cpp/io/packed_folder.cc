#include "io/packed_folder.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <set>
#include <string_view>
#include <utility>

#include "core/atomic_file.h"
#include "io/json_file.h"
#include "io/mapped_file.h"
#include "mustafar/error.h"

namespace mustafar {
namespace fs = std::filesystem;
namespace {

std::string stored_name(DType dtype) {
  return dtype == DType::kF32 ? "F32" : dtype == DType::kF16 ? "F16" : "BF16";
}

int64_t count(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (const int64_t extent : shape) n *= extent;
  return n;
}

int64_t words_for(int64_t n, int32_t bits) { return (n * bits + 31) / 32; }

// "model.layers.0.mlp.up_proj" of a matrix "model.layers.0.mlp.up_proj.weight".
std::string module_of(const std::string& name) { return name.substr(0, name.rfind('.')); }

// The tensors that a planned one becomes.
std::vector<DeclaredTensor> parts_of(const PlannedTensor& tensor) {
  if (!tensor.format) {
    return {{tensor.name, stored_name(tensor.dtype), tensor.shape,
             dtype_bytes(tensor.dtype, count(tensor.shape))}};
  }
  const GroupFormat& format = *tensor.format;
  const int64_t rows = tensor.shape.at(0), cols = tensor.shape.at(1);
  const int64_t groups = cols / format.group, words = words_for(cols, format.bits);
  const std::string name = module_of(tensor.name) + ".weight_";
  std::vector<DeclaredTensor> parts = {
      {name + "packed", "I32", {rows, words}, rows * words * 4},
      {name + "scale", stored_name(format.scale_dtype), {rows, groups}, rows * groups * 2},
      {name + "shape", "I64", {2}, 16}};
  if (!format.symmetric) {
    const int64_t zero_words = words_for(rows, format.bits);
    parts.push_back({name + "zero_point", "I32", {zero_words, groups}, zero_words * groups * 4});
  }
  return parts;
}

// The text of "quantization_config". Matrices of one format are Linear modules, all but those that
// stay; where formats differ, each has its modules by the last part of their names.
std::string quantization_config(const std::vector<PlannedTensor>& tensors) {
  std::map<int32_t, std::set<std::string>> groups;  // last parts of names, by group
  std::set<std::string> ignore = {"lm_head"};
  const GroupFormat* format = nullptr;
  for (const PlannedTensor& tensor : tensors) {
    const std::string module = module_of(tensor.name);
    if (tensor.format) {
      format = &*tensor.format;
      groups[tensor.format->group].insert(module.substr(module.rfind('.') + 1));
    } else if (tensor.shape.size() == 2 && module != "model.embed_tokens") {
      ignore.insert(module);
    }
  }
  JsonListText ignored;
  for (const std::string& module : ignore) ignored.add_text(json_text(module));
  JsonObjectText schemes;
  int index = 0;
  for (const auto& [group, names] : groups) {
    JsonListText targets;
    if (groups.size() == 1) targets.add_text(json_text("Linear"));
    for (const std::string& name : names) {
      if (groups.size() > 1) targets.add_text(json_text("re:.*\\." + name + "$"));
    }
    JsonObjectText weights, scheme;
    weights.add("num_bits", format->bits);
    weights.add("type", "int");
    weights.add("symmetric", format->symmetric);
    weights.add("strategy", "group");
    weights.add("group_size", group);
    weights.add("dynamic", false);
    scheme.add_text("targets", targets.take());
    scheme.add_text("weights", weights.take());
    scheme.add("input_activations", nullptr);
    scheme.add("output_activations", nullptr);
    schemes.add_text("group_" + std::to_string(index++), scheme.take());
  }
  JsonObjectText config;
  config.add("quant_method", "compressed-tensors");
  config.add("format", "pack-quantized");
  config.add("quantization_status", "compressed");
  config.add_text("ignore", ignored.take());
  config.add_text("config_groups", schemes.take());
  return config.take();
}

// A file of the source that has nothing to do with its weights.
bool is_kept(const std::string& name) {
  constexpr std::string_view kWeights[] = {".safetensors", ".bin",  ".pt",        ".pth",
                                           ".gguf",        ".onnx", ".h5",        ".msgpack",
                                           ".ot",          ".npz",  ".index.json"};
  if (name.empty() || name[0] == '.' || name == "config.json") return false;
  return std::none_of(std::begin(kWeights), std::end(kWeights),
                      [&](std::string_view end) { return name.ends_with(end); });
}

void copy_one(const fs::path& from, const fs::path& to) {
  const MappedFile file = MappedFile::open(from);
  AtomicFile copy(to);
  copy.write(file.data(), file.bytes());
  file.check_read();
  copy.commit();
}

void write_text(const fs::path& path, const std::string& text) {
  AtomicFile file(path);
  file.write(text.data(), text.size());
  file.commit();
}

// A folder beside `output` that nobody else has.
fs::path make_folder_beside(const fs::path& output) {
  static std::atomic<uint64_t> counter{0};
  std::error_code error;
  for (int i = 0; i < 1000; i++) {
    fs::path folder = output;
    folder += ".tmp-" + std::to_string(::getpid()) + "-" + std::to_string(counter++);
    if (fs::create_directory(folder, error)) return folder;
    if (error) break;
  }
  throw Error("cannot create a folder beside " + output.string() + ": " + error.message());
}

}  // namespace

void refuse_quantised(const fs::path& folder) {
  const fs::path path = folder / "config.json";
  const JsonTree<> config = read_json_file(path, kConfigCap);
  const auto found = config->find("quantization_config");
  if (found != config->end() && !found->is_null()) {
    throw ModelError(path.string() + ": the model is quantised already (\"quantization_config\")");
  }
}

void pack_codes(const uint8_t* codes, int64_t stride, int64_t n, int32_t bits, uint32_t* words) {
  const int64_t per_word = 32 / bits;
  std::fill_n(words, words_for(n, bits), 0u);
  for (int64_t i = 0; i < n; i++) {
    words[i / per_word] |= uint32_t{codes[i * stride]} << (i % per_word * bits);
  }
}

PackedFolder::PackedFolder(fs::path source, fs::path output,
                           const std::vector<PlannedTensor>& tensors, int64_t shard_bytes)
    : source_(std::move(source)), output_(std::move(output)) {
  if (!output_.has_filename()) output_ = output_.parent_path();  // "folder/"
  std::error_code error;
  if (fs::exists(fs::symlink_status(output_, error)) &&
      !(fs::is_directory(output_, error) && fs::is_empty(output_, error))) {
    throw Error("cannot write " + output_.string() + ": it is there, and not an empty folder");
  }
  add_config(tensors);
  folder_ = make_folder_beside(output_);
  try {
    plan(tensors, shard_bytes);
  } catch (...) {
    files_.clear();
    fs::remove_all(folder_, error);
    throw;
  }
}

PackedFolder::~PackedFolder() {
  std::error_code ignored;
  files_.clear();
  if (!folder_.empty()) fs::remove_all(folder_, ignored);
}

void PackedFolder::plan(const std::vector<PlannedTensor>& tensors, int64_t shard_bytes) {
  std::vector<std::vector<DeclaredTensor>> shards(1);
  int64_t in_shard = 0;
  for (const PlannedTensor& tensor : tensors) {
    const std::vector<DeclaredTensor> parts = parts_of(tensor);
    int64_t bytes = 0;
    for (const DeclaredTensor& part : parts) bytes += part.bytes;
    if (in_shard > 0 && in_shard + bytes > shard_bytes) {
      shards.emplace_back();
      in_shard = 0;
    }
    shards.back().insert(shards.back().end(), parts.begin(), parts.end());
    in_shard += bytes;
    total_bytes_ += bytes;
  }
  std::map<std::string, std::string> names;  // of files, by tensor
  for (size_t i = 0; i < shards.size(); i++) {
    char name[64] = "model.safetensors";
    if (shards.size() > 1) {
      std::snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", i + 1, shards.size());
    }
    files_.push_back(std::make_unique<SafetensorsWriter>(folder_ / name, shards[i]));
    for (const DeclaredTensor& tensor : shards[i]) {
      file_of_[tensor.name] = files_.back().get();
      names[tensor.name] = name;
    }
  }
  if (shards.size() == 1) return;
  JsonObjectText map, metadata, index;
  for (const auto& [tensor, file] : names) map.add(tensor, file);
  metadata.add("total_size", total_bytes_);
  index.add_text("metadata", metadata.take());
  index.add_text("weight_map", map.take());
  index_ = index.take();
}

// The source's config with one more field at its end, and nothing else changed.
void PackedFolder::add_config(const std::vector<PlannedTensor>& tensors) {
  const fs::path path = source_ / "config.json";
  refuse_quantised(source_);
  const MappedFile file = MappedFile::open(path);
  std::string text(reinterpret_cast<const char*>(file.data()), file.bytes());
  file.check_read();
  text.erase(text.rfind('}'));
  text.erase(text.find_last_not_of(" \t\r\n") + 1);
  config_ = text + (text.ends_with('{') ? "" : ",") +
            "\n  \"quantization_config\": " + quantization_config(tensors) + "\n}\n";
}

void PackedFolder::write_tensor(const std::string& name, const void* data) {
  file_of_.at(name)->write(name, data);
}

void PackedFolder::write(const std::string& name, const void* data) { write_tensor(name, data); }

void PackedFolder::write(const std::string& name, const GroupCodes& matrix) {
  const GroupFormat& format = matrix.format;
  const std::string part = module_of(name) + ".weight_";
  const int64_t words = words_for(matrix.cols, format.bits);
  std::vector<uint32_t> packed(matrix.rows * words);
  for (int64_t r = 0; r < matrix.rows; r++) {
    pack_codes(matrix.codes.data() + r * matrix.cols, 1, matrix.cols, format.bits,
               packed.data() + r * words);
  }
  write_tensor(part + "packed", packed.data());
  write_tensor(part + "scale", matrix.scales.data());
  const int64_t shape[] = {matrix.rows, matrix.cols};
  write_tensor(part + "shape", shape);
  if (format.symmetric) return;
  const int64_t groups = matrix.n_groups(), zero_words = words_for(matrix.rows, format.bits);
  std::vector<uint32_t> column(zero_words), zeros(zero_words * groups);
  for (int64_t g = 0; g < groups; g++) {
    pack_codes(matrix.zeros.data() + g, groups, matrix.rows, format.bits, column.data());
    for (int64_t w = 0; w < zero_words; w++) zeros[w * groups + g] = column[w];
  }
  write_tensor(part + "zero_point", zeros.data());
}

void PackedFolder::copy_others() const {
  constexpr const char* kTemplates = "additional_chat_templates";
  for (const fs::directory_entry& entry : fs::directory_iterator(source_)) {
    const std::string name = entry.path().filename().string();
    if (entry.is_regular_file() && is_kept(name)) copy_one(entry.path(), folder_ / name);
  }
  if (!fs::is_directory(source_ / kTemplates)) return;
  fs::create_directory(folder_ / kTemplates);
  for (const fs::directory_entry& entry : fs::directory_iterator(source_ / kTemplates)) {
    if (!entry.is_regular_file()) continue;
    copy_one(entry.path(), folder_ / kTemplates / entry.path().filename());
  }
}

void PackedFolder::finish() {
  for (const auto& file : files_) file->finish();
  try {
    copy_others();
  } catch (const fs::filesystem_error& error) {
    throw Error("cannot copy the files of " + source_.string() + ": " + error.code().message());
  }
  if (!index_.empty()) write_text(folder_ / "model.safetensors.index.json", index_);
  write_text(folder_ / "config.json", config_);
  if (::rename(folder_.c_str(), output_.c_str()) != 0) {
    throw Error("cannot move " + folder_.string() + " to " + output_.string() + ": " +
                std::strerror(errno));
  }
  folder_.clear();
}

}  // namespace mustafar
