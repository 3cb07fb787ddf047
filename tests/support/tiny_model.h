// A whole model small enough for a thousand turns in a sanitised build: random weights, a tokenizer
// of single bytes and a chat template.
#pragma once

#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "support/model_folder.h"

namespace mustafar::testing {

inline constexpr int kTinyBos = 256, kTinyEnd = 257;  // "<|start|>", "<|end|>"
inline constexpr const char* kTinyTemplate =
    "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}assistant: {% endif %}";

// The character that stands for a byte in byte-level vocabularies, as UTF-8.
inline std::string byte_character(int byte) {
  int code = byte;
  const auto is_plain = [](int b) {
    return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || (b >= 174 && b <= 255);
  };
  if (!is_plain(byte)) {
    code = 256;
    for (int b = 0; b < byte; b++) code += is_plain(b) ? 0 : 1;
  }
  if (code < 128) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 63))};
}

inline nlohmann::json byte_tokenizer() {
  nlohmann::json vocab = nlohmann::json::object();
  for (int byte = 0; byte < 256; byte++) vocab[byte_character(byte)] = byte;
  const auto special = [](int id, const char* content) {
    return nlohmann::json{{"id", id},           {"content", content}, {"special", true},
                          {"lstrip", false},    {"rstrip", false},    {"single_word", false},
                          {"normalized", false}};
  };
  return {
      {"version", "1.0"},
      {"added_tokens", {special(kTinyBos, "<|start|>"), special(kTinyEnd, "<|end|>")}},
      {"normalizer", nullptr},
      {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}},
      {"post_processor", nullptr},
      {"decoder", {{"type", "ByteLevel"}}},
      {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", nlohmann::json::array()}}}};
}

// Writes a model of 2 layers, 2 heads over one KV head of 16 dims, vocabulary 258, F32.
inline void write_tiny_model(const std::filesystem::path& folder) {
  constexpr int64_t kHidden = 16, kInner = 24, kVocab = 258, kDim = 16;
  std::mt19937 random(1);
  std::vector<TestTensor> tensors;
  const auto add = [&](const std::string& name, std::vector<int64_t> shape) {
    TestTensor tensor = zero_tensor(name, std::move(shape));
    for (size_t at = 0; at < tensor.bytes.size(); at += sizeof(float)) {
      const float value = tensor.shape.size() == 1
                              ? 1.0f
                              : (static_cast<float>(random() % 20001) / 10000.0f - 1.0f) * 0.5f;
      std::memcpy(tensor.bytes.data() + at, &value, sizeof(value));
    }
    tensors.push_back(std::move(tensor));
  };
  add("model.embed_tokens.weight", {kVocab, kHidden});
  add("lm_head.weight", {kVocab, kHidden});
  add("model.norm.weight", {kHidden});
  for (int i = 0; i < 2; i++) {
    const std::string layer = "model.layers." + std::to_string(i) + ".";
    add(layer + "input_layernorm.weight", {kHidden});
    add(layer + "post_attention_layernorm.weight", {kHidden});
    add(layer + "self_attn.q_proj.weight", {2 * kDim, kHidden});
    add(layer + "self_attn.k_proj.weight", {kDim, kHidden});
    add(layer + "self_attn.v_proj.weight", {kDim, kHidden});
    add(layer + "self_attn.o_proj.weight", {kHidden, 2 * kDim});
    add(layer + "mlp.gate_proj.weight", {kInner, kHidden});
    add(layer + "mlp.up_proj.weight", {kInner, kHidden});
    add(layer + "mlp.down_proj.weight", {kHidden, kInner});
  }
  nlohmann::json config = tiny_config();
  config["hidden_size"] = kHidden;
  config["intermediate_size"] = kInner;
  config["num_attention_heads"] = 2;
  config["num_key_value_heads"] = 1;
  config["head_dim"] = kDim;
  config["vocab_size"] = kVocab;
  config["max_position_embeddings"] = 4096;
  config["bos_token_id"] = kTinyBos;
  config["eos_token_id"] = kTinyEnd;
  const auto write = [&](const char* name, const std::string& bytes) {
    std::ofstream(folder / name, std::ios::binary) << bytes;
  };
  write("config.json", config.dump());
  write("model.safetensors", safetensors_bytes(tensors));
  write("tokenizer.json", byte_tokenizer().dump());
  write("tokenizer_config.json",
        nlohmann::json{
            {"bos_token", "<|start|>"}, {"eos_token", "<|end|>"}, {"chat_template", kTinyTemplate}}
            .dump());
}

}  // namespace mustafar::testing
