#include "io/quantised/quantisation.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string_view>
#include <utility>

#include "io/config_fields.h"
#include "io/json_file.h"

namespace mustafar {
namespace {

using nlohmann::json;
using Scales = QuantScheme::Scales;

bool is_one_of(std::string_view text, std::initializer_list<std::string_view> all) {
  return std::find(all.begin(), all.end(), text) != all.end();
}

// A name from the file as messages have it.
std::string printable(std::string name) {
  constexpr size_t kLongest = 60;
  name.resize(std::min(name.size(), kLongest));
  for (char& c : name) c = c < 0x20 || c > 0x7e ? '?' : c;
  return name;
}

// Two positive integers, of [outputs, inputs].
void read_block(const Fields& fields, const char* field, QuantScheme& scheme) {
  const json& block = *fields.find(field);
  if (!block.is_array() || block.size() != 2) {
    fields.fail(field, "a list of 2 integers", block);
  }
  scheme.scales = Scales::kBlocks;
  scheme.block_rows = fields.to_integer(field, block[0], 1, kInt32Max);
  scheme.group = fields.to_integer(field, block[1], 1, kInt32Max);
}

// -1, or null: whole rows.
void read_group(const Fields& fields, int32_t otherwise, QuantScheme& scheme) {
  const int32_t group = fields.integer_or("group_size", -1, kInt32Max, otherwise);
  if (group == 0) fields.fail("group_size", "expected -1 or 1 or more, found 0");
  scheme.scales = group > 0 ? Scales::kGroups : Scales::kRow;
  scheme.group = std::max(group, 0);
}

void check_ct_format(const Fields& fields) {
  const std::string format = fields.string_or("format", "pack-quantized");
  if (!is_one_of(format, {"pack-quantized", "int-quantized", "float-quantized", "naive-quantized",
                          "mixed-precision"})) {
    fields.fail("format",
                "expected pack-quantized, int-quantized, float-quantized or naive-quantized, "
                "found " +
                    describe(json(format)));
  }
}

QuantScheme read_ct_weights(const Fields& fields) {
  QuantScheme scheme;
  const std::string type = fields.string_or("type", "int");
  if (!is_one_of(type, {"int", "float"})) {
    fields.fail("type", "expected int or float, found " + describe(json(type)));
  }
  scheme.is_float = type == "float";
  scheme.bits = fields.integer_or("num_bits", 1, 32, 8);
  if (scheme.bits != 8 && (scheme.is_float || scheme.bits != 4)) {
    fields.fail("num_bits", std::string("expected ") + (scheme.is_float ? "8" : "4 or 8") +
                                ", found " + std::to_string(scheme.bits));
  }
  scheme.zero_points = !fields.boolean_or("symmetric", true);
  if (scheme.is_float && scheme.zero_points) {
    fields.fail("symmetric", "expected true beside type float, found false");
  }
  const bool has_group = fields.find("group_size") != nullptr;
  const bool row = has_group && fields.integer("group_size", -1, kInt32Max) < 0;
  const std::string strategy =
      fields.string_or("strategy", !has_group ? "tensor" : (row ? "channel" : "group"));
  if (strategy == "channel") {
    scheme.scales = Scales::kRow;
  } else if (strategy == "group" && has_group && !row) {
    read_group(fields, -1, scheme);
  } else if (strategy == "block" && fields.find("block_structure") != nullptr) {
    read_block(fields, "block_structure", scheme);
  } else if (strategy != "tensor") {
    fields.fail("strategy",
                "expected tensor, channel, group with a group_size or block with a "
                "block_structure, found " +
                    describe(json(strategy)));
  }
  return scheme;
}

void refuse_ct_extras(const Fields& fields) {
  if (fields.find("kv_cache_scheme") != nullptr) {
    fields.fail("kv_cache_scheme",
                "a cache with the checkpoint's own scales is not supported: set it to null for "
                "this library's cache");
  }
  if (const json* sparsity = fields.object("sparsity_config")) {
    const Fields within = fields.within("sparsity_config", *sparsity);
    const std::string format = within.string_or("format", "dense");
    if (format != "dense") within.fail("format", "expected dense, found " + describe(json(format)));
  }
  if (const json* transform = fields.object("transform_config")) {
    const json* groups = fields.within("transform_config", *transform).object("config_groups");
    if (groups != nullptr && !groups->empty()) {
      fields.fail("transform_config", "transforms of weights and activations are not supported");
    }
  }
}

void read_ct_config(const Fields& fields, Quantisation& quantisation) {
  check_ct_format(fields);
  refuse_ct_extras(fields);
  const json* groups = fields.object("config_groups");
  if (groups == nullptr) fields.fail("config_groups", "is missing; expected an object");
  const Fields all = fields.within("config_groups", *groups);
  for (const auto& [key, value] : groups->items()) {
    const std::string name = printable(key);
    if (!value.is_object()) all.fail(name, "an object", value);
    const Fields group = all.within(name.c_str(), value);
    check_ct_format(group);
    if (group.find("output_activations") != nullptr) {
      group.fail("output_activations", "rounding what a matrix puts out is not supported");
    }
    if (const json* weights = group.object("weights")) {
      quantisation.schemes.push_back(read_ct_weights(group.within("weights", *weights)));
    }
  }
}

void read_gptq_config(const Fields& fields, Quantisation& quantisation) {
  QuantScheme scheme;
  scheme.bits = fields.integer("bits", 1, 32);
  if (scheme.bits != 4 && scheme.bits != 8) {
    fields.fail("bits", "expected 4 or 8, found " + std::to_string(scheme.bits));
  }
  read_group(fields, 128, scheme);
  scheme.zero_points = true;
  const char* field = fields.find("checkpoint_format") != nullptr ? "checkpoint_format" : "format";
  const std::string format = fields.string_or(field, "gptq");
  if (!is_one_of(format, {"gptq", "gptq_v2"})) {
    fields.fail(field, "expected gptq or gptq_v2, found " + describe(json(format)));
  }
  if (fields.boolean_or("is_marlin_format", false)) {
    fields.fail("is_marlin_format", "expected false, found true");
  }
  if (const json* rules = fields.object("dynamic")) {
    // A pattern after "-:" says which modules are not quantised.
    for (const auto& [pattern, settings] : rules->items()) {
      if (pattern.rfind("-:", 0) == 0) continue;
      fields.fail("dynamic", "other settings for some modules are not supported, found " +
                                 describe(json(pattern)));
    }
  }
  quantisation.gptq_zeros_less_one = format == "gptq";
  quantisation.gptq_needs_index = fields.boolean_or("desc_act", false);
  quantisation.schemes.push_back(scheme);
}

void read_awq_config(const Fields& fields, Quantisation& quantisation) {
  QuantScheme scheme;
  scheme.bits = fields.integer_or("bits", 1, 32, 4);
  if (scheme.bits != 4) {
    fields.fail("bits", "expected 4, found " + std::to_string(scheme.bits));
  }
  read_group(fields, 128, scheme);
  scheme.zero_points = true;
  const char* field = fields.find("version") != nullptr ? "version" : "format";
  std::string version = fields.string_or(field, "gemm");
  std::transform(version.begin(), version.end(), version.begin(),
                 [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; });
  if (version != "gemm") fields.fail(field, "expected gemm, found " + describe(json(version)));
  if (!fields.boolean_or("zero_point", true)) {
    fields.fail("zero_point", "expected true, found false");
  }
  quantisation.schemes.push_back(scheme);
}

void read_fp8_config(const Fields& fields, Quantisation& quantisation) {
  const std::string format = fields.string_or("fmt", "e4m3");
  if (format != "e4m3") fields.fail("fmt", "expected e4m3, found " + describe(json(format)));
  QuantScheme scheme;
  scheme.is_float = true;
  scheme.bits = 8;
  if (fields.find("weight_block_size") != nullptr) {
    read_block(fields, "weight_block_size", scheme);
    quantisation.schemes.push_back(scheme);
    return;
  }
  quantisation.schemes.push_back(scheme);  // one scale, or as the tensor's shape says
  scheme.scales = Scales::kRow;
  quantisation.schemes.push_back(scheme);
}

}  // namespace

std::vector<int64_t> QuantScheme::scale_shape(int64_t rows, int64_t cols) const {
  switch (scales) {
    case Scales::kRow:
      return {rows, 1};
    case Scales::kGroups:
    case Scales::kBlocks:
      return {(rows + block_rows - 1) / block_rows, n_groups(cols)};
    default:
      return {1};
  }
}

std::string Quantisation::name() const {
  switch (method) {
    case Method::kCompressedTensors:
      return "compressed-tensors";
    case Method::kAwq:
      return "awq";
    case Method::kGptq:
      return "gptq";
    case Method::kFp8:
      return "fp8";
    default:
      return "";
  }
}

Quantisation read_quantisation(const Fields& config) {
  Quantisation quantisation;
  const json* object = config.object("quantization_config");
  if (object == nullptr) return quantisation;
  const Fields fields = config.within("quantization_config", *object);
  using Method = Quantisation::Method;
  const struct {
    Method method;
    void (*read)(const Fields&, Quantisation&);
  } kMethods[] = {{Method::kCompressedTensors, read_ct_config},
                  {Method::kGptq, read_gptq_config},
                  {Method::kAwq, read_awq_config},
                  {Method::kFp8, read_fp8_config}};
  for (const auto& [method, read] : kMethods) {
    quantisation.method = method;
    if (fields.string_or("quant_method", "") != quantisation.name()) continue;
    read(fields, quantisation);
    return quantisation;
  }
  const json* method = fields.find("quant_method");
  fields.fail("quant_method", "expected compressed-tensors, gptq, awq or fp8, found " +
                                  (method == nullptr ? "nothing" : describe(*method)));
}

Quantisation read_quantisation(const std::filesystem::path& folder) {
  constexpr size_t kCap = 16 << 20;  // bytes
  const std::filesystem::path file = folder / "config.json";
  const JsonTree<> object = read_json_file(file, kCap);
  return read_quantisation(Fields(file, *object));
}

}  // namespace mustafar
