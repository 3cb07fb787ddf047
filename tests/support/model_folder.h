// Writes small model folders, whole or spoiled, for the tests.
#pragma once

#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

namespace mustafar::testing {

// A directory that goes away with the object.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "mustafar-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
    path_ = pattern;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }

  std::filesystem::path write(const std::string& name, const std::string& bytes) const {
    std::ofstream(path_ / name, std::ios::binary) << bytes;
    return path_ / name;
  }

 private:
  std::filesystem::path path_;
};

inline std::string little_endian(uint64_t value) {
  std::string bytes;
  for (int i = 0; i < 8; i++) bytes += static_cast<char>(value >> (8 * i));
  return bytes;
}

// A safetensors file of a header as text and the bytes after it.
inline std::string safetensors_bytes(const std::string& header, const std::string& data) {
  return little_endian(header.size()) + header + data;
}

struct TestTensor {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  std::string bytes;
};

inline TestTensor zero_tensor(const std::string& name, std::vector<int64_t> shape,
                              const std::string& dtype = "F32") {
  size_t n = dtype == "F32" ? 4 : 2;
  for (int64_t dim : shape) n *= static_cast<size_t>(dim);
  return {name, dtype, std::move(shape), std::string(n, '\0')};
}

// padding: spaces after the header.
inline std::string safetensors_bytes(const std::vector<TestTensor>& tensors, size_t padding = 0) {
  nlohmann::json header = nlohmann::json::object();
  std::string data;
  for (const TestTensor& tensor : tensors) {
    header[tensor.name] = {{"dtype", tensor.dtype},
                           {"shape", tensor.shape},
                           {"data_offsets", {data.size(), data.size() + tensor.bytes.size()}}};
    data += tensor.bytes;
  }
  return safetensors_bytes(header.dump() + std::string(padding, ' '), data);
}

// hidden 8, intermediate 12, 2 layers, 4 heads over 2 KV heads of 2 dims, vocabulary 10.
inline nlohmann::json tiny_config() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"model_type", "llama"},
          {"hidden_size", 8},
          {"intermediate_size", 12},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"vocab_size", 10},
          {"max_position_embeddings", 64},
          {"rms_norm_eps", 1e-5},
          {"rope_theta", 10000.0},
          {"hidden_act", "silu"},
          {"tie_word_embeddings", false},
          {"torch_dtype", "float32"},
          {"bos_token_id", 1},
          {"eos_token_id", 2}};
}

inline std::vector<TestTensor> tiny_tensors() {
  std::vector<TestTensor> tensors = {zero_tensor("model.embed_tokens.weight", {10, 8}),
                                     zero_tensor("lm_head.weight", {10, 8}),
                                     zero_tensor("model.norm.weight", {8})};
  for (int i = 0; i < 2; i++) {
    const std::string layer = "model.layers." + std::to_string(i) + ".";
    for (const char* name : {"input_layernorm", "post_attention_layernorm"}) {
      tensors.push_back(zero_tensor(layer + name + ".weight", {8}));
    }
    tensors.push_back(zero_tensor(layer + "self_attn.q_proj.weight", {8, 8}));
    tensors.push_back(zero_tensor(layer + "self_attn.k_proj.weight", {4, 8}));
    tensors.push_back(zero_tensor(layer + "self_attn.v_proj.weight", {4, 8}));
    tensors.push_back(zero_tensor(layer + "self_attn.o_proj.weight", {8, 8}));
    tensors.push_back(zero_tensor(layer + "mlp.gate_proj.weight", {12, 8}));
    tensors.push_back(zero_tensor(layer + "mlp.up_proj.weight", {12, 8}));
    tensors.push_back(zero_tensor(layer + "mlp.down_proj.weight", {8, 12}));
  }
  return tensors;
}

// Expects the statement to throw a ModelError whose message has the text.
#define EXPECT_MODEL_ERROR(statement, text)                            \
  try {                                                                \
    statement;                                                         \
    ADD_FAILURE() << "expected a ModelError: " << (text);              \
  } catch (const ::mustafar::ModelError& error) {                      \
    EXPECT_NE(std::string(error.what()).find(text), std::string::npos) \
        << "expected: " << (text) << "\nmessage: " << error.what();    \
  }

}  // namespace mustafar::testing
