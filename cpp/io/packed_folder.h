// Writes a folder of quantised weights in the layout of compressed-tensors ("pack-quantized"),
// which transformers and vLLM read. A matrix NAME.weight becomes
//
//   NAME.weight_packed      int32 [outputs, inputs * bits / 32], the first code in the lowest bits
//   NAME.weight_scale       f16 or bf16 [outputs, groups]
//   NAME.weight_zero_point  int32 [ceil(outputs * bits / 32), groups], packed along the outputs;
//                           only where zeros differ
//   NAME.weight_shape       int64 [2]: outputs, inputs
//
// and config.json says in "quantization_config" which matrices those are. Everything else is as in
// the folder that it was made from.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "format/group_codes.h"
#include "io/safetensors_writer.h"

namespace mustafar {

// A tensor of the model as stored, and what it is to become.
struct PlannedTensor {
  std::string name;  // NAME.weight, of a matrix that becomes codes
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  std::optional<GroupFormat> format;  // none: it stays as it is
};

class PackedFolder {
 public:
  // source: the folder of the model. output: is not there, or an empty folder; it appears whole in
  // finish(), until when everything is in a folder beside it, which goes away with the object.
  // Tensors go to files of at most shard_bytes, unless one alone is larger, in the order given.
  // Throws Error naming path and reason, as the other calls do; ModelError as refuse_quantised().
  PackedFolder(std::filesystem::path source, std::filesystem::path output,
               const std::vector<PlannedTensor>& tensors, int64_t shard_bytes);
  ~PackedFolder();
  PackedFolder(const PackedFolder&) = delete;
  PackedFolder& operator=(const PackedFolder&) = delete;

  // A tensor that stays as it is.
  void write(const std::string& name, const void* data);
  // A matrix that was planned with its codes' format.
  void write(const std::string& name, const GroupCodes& codes);
  // Writes config, index and the source's other files (tokenizer, templates, ...), and moves the
  // folder to its place. All tensors have been written.
  void finish();

  int64_t total_bytes() const { return total_bytes_; }  // of the tensors

 private:
  void plan(const std::vector<PlannedTensor>& tensors, int64_t shard_bytes);
  void add_config(const std::vector<PlannedTensor>& tensors);
  void copy_others() const;
  void write_tensor(const std::string& name, const void* data);

  std::filesystem::path source_, output_, folder_;  // folder_: what is written to
  std::string config_;                              // text of the new config.json
  std::string index_;                               // text of the index, or empty
  std::map<std::string, SafetensorsWriter*> file_of_;
  std::vector<std::unique_ptr<SafetensorsWriter>> files_;
  int64_t total_bytes_ = 0;
};

// Throws ModelError where the folder's config.json can't be read, or says that its weights are
// quantised.
void refuse_quantised(const std::filesystem::path& folder);

// Codes [n] of 4 or 8 bits as 32-bit words, the first in the lowest bits; stride: from one code to
// the next. What the last word has room for beyond is zero.
void pack_codes(const uint8_t* codes, int64_t stride, int64_t n, int32_t bits, uint32_t* words);

}  // namespace mustafar
