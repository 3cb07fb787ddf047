// The weights of a Hugging Face folder: config.json with model.safetensors, or with the shards that
// model.safetensors.index.json names. Everything is checked when it is opened; afterwards tensors
// are only looked up. Matrices may be quantised (quantised/): those stand apart from the tensors.
//
// Values are used as they are stored: NaN and infinities in the weights are not looked for, they
// flow into the logits, where the sampler refuses them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/buffer.h"
#include "core/dtype.h"
#include "io/quantised/quantisation.h"
#include "io/quantised/stored_matrix.h"
#include "io/safetensors.h"
#include "mustafar/model_config.h"

namespace mustafar {

// A tensor in memory that the checkpoint owns. data is aligned to its element.
struct TensorView {
  std::string_view name;
  DType dtype = DType::kF32;   // f32, f16 or bf16
  std::vector<int64_t> shape;  // outermost first
  const void* data = nullptr;
  int64_t bytes = 0;
  const std::filesystem::path* file = nullptr;
};

class Checkpoint {
 public:
  // Reads the config, maps the weights and checks that exactly the tensors the config calls for are
  // there, with the right shapes and types. Throws ModelError.
  static Checkpoint open(const std::filesystem::path& folder);

  // tie_word_embeddings is corrected by the tensors.
  const ModelConfig& config() const { return config_; }
  const std::filesystem::path& folder() const { return folder_; }

  // Null where there is no such tensor.
  const TensorView* find(std::string_view name) const;
  // Throws ModelError with expected and actual shape.
  const TensorView& require(std::string_view name, std::initializer_list<int64_t> shape) const;

  // The quantised matrix that a module has in place of the tensor of this name, as in
  // "model.layers.0.mlp.up_proj.weight"; null where it has none.
  const StoredMatrix* find_quantised(std::string_view name) const;
  const Quantisation& quantisation() const { return quantisation_; }
  // The type of values that the config names, bf16 where it names none.
  DType model_dtype() const;

  // The matrix [vocab, hidden] that embeds tokens and the one that makes logits. Where they are
  // tied, both are the one tensor that the folder has, under whichever name. Of folders where
  // neither is quantised.
  const TensorView& embedding() const;
  const TensorView& lm_head() const;

  void for_each(const std::function<void(const TensorView&)>& visit) const;  // by name
  void for_each_quantised(
      const std::function<void(const std::string& name, const StoredMatrix&)>& visit) const;
  int64_t total_bytes() const { return total_bytes_; }  // of the tensors the model uses

  // Brings all weights into memory, so that the first tokens do not wait for the disk. progress is
  // called with bytes done and bytes in all (of the files), and may throw to stop.
  void load_all(const std::function<void(int64_t done, int64_t total)>& progress = {}) const;
  // Brings bytes of a tensor into memory; throws ModelError where the file lost them.
  void prefault(const void* data, int64_t bytes) const;
  // Bytes of a tensor that will hardly be read again need not stay mapped in memory. Only a hint.
  void release(const void* data, int64_t bytes) const;
  // Throws ModelError if a file's size changed since it was opened.
  void verify() const;
  // Throws ModelError where tensors that were read may not have been the files'.
  void check_read() const;

 private:
  struct Source {
    const SafetensorsFile* file = nullptr;
    const SafetensorsEntry* entry = nullptr;
  };
  using Sources = std::map<std::string, Source, std::less<>>;

  // The file that holds bytes of a tensor, null for a copy (aligned_).
  const MappedFile* file_of(const void* data) const;
  void open_files();
  void open_shards(const std::filesystem::path& index);
  Sources index_tensors() const;
  void take(Sources& sources, const std::string& name, std::vector<int64_t> shape);
  // The weight [rows][cols] of a module, quantised or not.
  void take_matrix(Sources& sources, const std::string& module, int64_t rows, int64_t cols);
  void check_rest(const Sources& sources) const;
  static bool is_zero(const Source& source);
  void take_all(Sources sources);

  std::filesystem::path folder_;
  ModelConfig config_;
  std::vector<SafetensorsFile> files_;  // not changed once tensors point into it
  std::vector<HostBuffer> aligned_;     // copies of tensors that lie unaligned in their file
  std::map<std::string, TensorView, std::less<>> tensors_;
  Quantisation quantisation_;
  std::map<std::string, std::unique_ptr<const StoredMatrix>, std::less<>> quantised_;
  int64_t total_bytes_ = 0;
};

}  // namespace mustafar
