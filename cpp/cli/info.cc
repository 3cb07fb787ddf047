// `mustafar info`: what a model folder holds and what its cache will cost.
#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cli/commands.h"
#include "cli/demo_model.h"
#include "cli/interrupt.h"
#include "cli/options.h"
#include "cli/report.h"
#include "cli/terminal.h"
#include "io/checkpoint.h"
#include "model/stored_weights.h"
#include "mustafar/error.h"
#include "runtime/model_impl.h"
#include "runtime/row_budget.h"

namespace mustafar::cli {
namespace {

constexpr size_t kMostSpecialTokens = 1000;  // listed; some tokenizers reserve many more
constexpr double kTableTokens = 16384;       // what the table of settings gives bytes for, "16K"

using Json = nlohmann::ordered_json;

struct Options {
  ModelFlags model;
  CacheFlags cache;
  bool tensors = false;
  bool json = false;
};

struct Setting {
  std::string name;
  KVConfig config;
};

// The flags' own setting, then the usual ones to compare with.
std::vector<Setting> settings_of(const KVConfig& chosen) {
  const auto make = [](const char* name, double k, double v, ValueType type) {
    KVConfig config;
    config.k_sparsity = k;
    config.v_sparsity = v;
    config.value_dtype = type;
    return Setting{name, config};
  };
  return {{"as given", chosen},
          make("dense", 0.0, 0.0, ValueType::kAuto),
          make("dense int8", 0.0, 0.0, ValueType::kInt8),
          make("K .5 V .5", 0.5, 0.5, ValueType::kAuto),
          make("K .5 V .5 int8", 0.5, 0.5, ValueType::kInt8),
          make("K .5 V .5 int4", 0.5, 0.5, ValueType::kInt4),
          make("K .625 V .75", 0.625, 0.75, ValueType::kAuto),
          make("K .625 V .75 int8", 0.625, 0.75, ValueType::kInt8)};
}

Json cache_json(const Model& model, const Setting& setting) {
  const ModelConfig& config = model.config();
  const CacheSpec spec = dealt_cache_spec(config, model.impl()->dtype, setting.config);
  const double bytes = static_cast<double>(spec.layout.page_bytes) / kBlockTokens;
  const double dense = 2.0 * 2 * config.n_layers * config.n_kv_heads * config.head_dim;
  return {{"setting", setting.name},
          {"config", to_json(setting.config)},
          {"bytes_per_token", bytes},
          {"of_dense", bytes / dense},
          {"dense_part_bytes", spec.dense_bytes(spec.most_dense_tokens)}};
}

Json tokenizer_json(const Model& model) {
  if (!model.has_tokenizer()) return nullptr;
  const Tokenizer& tokenizer = model.tokenizer();
  Json special = Json::array();
  for (int32_t id = 0; id < tokenizer.vocab_size() && special.size() < kMostSpecialTokens; id++) {
    if (tokenizer.is_special(id))
      special.push_back({{"id", id}, {"text", tokenizer.id_to_token(id)}});
  }
  return {{"vocab_size", tokenizer.vocab_size()},
          {"prefix", tokenizer.special_prefix()},
          {"special_tokens", special}};
}

// What the folder's tensors are and how many.
struct Tensors {
  std::map<std::string, int64_t> bytes;  // by type
  int64_t count = 0;
  int64_t parameters = 0;
  Json quantised = nullptr;  // method, and numbers of matrices by what becomes of them
  Json list = Json::array();

  explicit Tensors(const Checkpoint& checkpoint) {
    checkpoint.for_each([&](const TensorView& tensor) {
      bytes[dtype_name(tensor.dtype)] += tensor.bytes;
      parameters += tensor.bytes / dtype_bytes(tensor.dtype, 1);
      add(std::string(tensor.name), dtype_name(tensor.dtype), tensor.shape, tensor.bytes);
    });
    checkpoint.for_each_quantised([&](const std::string&, const StoredMatrix& matrix) {
      const std::string type = matrix.is_float ? "fp8" : "int" + std::to_string(matrix.bits);
      parameters += matrix.rows * matrix.cols;
      for (const StoredPart& part : matrix.parts) {
        bytes[type] += part.bytes;
        add(part.name, std::string(part.dtype), part.shape, part.bytes);
      }
      quantised["method"] = checkpoint.quantisation().name();
      Json& n = quantised["matrices"][describe_kept(matrix)];
      n = n.is_null() ? 1 : n.get<int64_t>() + 1;
    });
  }

 private:
  void add(const std::string& name, const std::string& dtype, const std::vector<int64_t>& shape,
           int64_t n_bytes) {
    count++;
    list.push_back({{"name", name}, {"dtype", dtype}, {"shape", shape}, {"bytes", n_bytes}});
  }
};

Json collect(const Options& options) {
  const Model model = options.model.load();
  Tensors tensors(Checkpoint::open(model.folder()));
  const ModelMemory memory = model.memory();
  Json json = {{"model", model.folder().string()},
               {"config", to_json(model.config())},
               {"parameters", tensors.parameters},
               {"n_tensors", tensors.count},
               {"tensor_bytes", tensors.bytes},
               {"quantised", std::move(tensors.quantised)},
               {"device", model.device()},
               {"device_description", model.device_description()},
               {"dtype", model.dtype()},
               {"weights", model.weights()},
               {"memory",
                {{"weights_bytes", memory.weights_bytes},
                 {"workspace_bytes", memory.workspace_bytes},
                 {"kv_bytes", memory.kv_bytes},
                 {"kv_budget", memory.kv_budget}}},
               {"tokenizer", tokenizer_json(model)},
               {"sampling", sampling_json(model)}};
  for (const Setting& setting : settings_of(options.cache.resolve(model))) {
    json["kv_cache"].push_back(cache_json(model, setting));
  }
  if (options.tensors) json["tensors"] = std::move(tensors.list);
  return json;
}

void print_line(const char* label, const std::string& text) {
  std::printf("%-10s %s\n", label, text.c_str());
}

std::string number(const Json& json, const char* field) {
  return std::to_string(json.at(field).get<int64_t>());
}

// "96 tokens in all layers", "96 tokens in layers 0, 2 to 4 and 6".
std::string window_text(const Json& config) {
  std::string text = number(config, "sliding_window") + " tokens";
  const auto layers = config.at("sliding_window_layers").get<std::vector<int64_t>>();
  if (std::ssize(layers) == config.at("n_layers").get<int64_t>()) return text + " in all layers";
  std::vector<std::string> spans;
  for (size_t first = 0, last; first < layers.size(); first = last + 1) {
    last = first;
    while (last + 1 < layers.size() && layers[last + 1] == layers[last] + 1) last++;
    spans.push_back(std::to_string(layers[first]));
    if (last > first)
      spans.back() += (last > first + 1 ? " to " : ", ") + std::to_string(layers[last]);
  }
  text += layers.size() == 1 ? " in layer " : " in layers ";
  for (size_t i = 0; i < spans.size(); i++) {
    text += (i == 0 ? "" : i + 1 < spans.size() ? ", " : " and ") + spans[i];
  }
  return text + ", the others see all";
}

void print_model(const Json& json) {
  const Json& config = json.at("config");
  print_line("model", json.at("model").get<std::string>() + " (" +
                          config.at("model_type").get<std::string>() + ", " +
                          format_count(json.at("parameters").get<double>()) + " parameters)");
  print_line("shape",
             number(config, "n_layers") + " layers, hidden " + number(config, "hidden_size") +
                 ", feed-forward " + number(config, "intermediate_size") + ", heads " +
                 number(config, "n_heads") + "/" + number(config, "n_kv_heads") + " x " +
                 number(config, "head_dim") + ", vocabulary " + number(config, "vocab_size"));
  print_line("context", number(config, "max_position_embeddings") + " tokens, rope theta " +
                            format_number(config.at("rope_theta").get<double>(), 0) + ", scaling " +
                            config.at("rope_scaling").get<std::string>());
  if (!config.at("sliding_window").is_null()) print_line("window", window_text(config));
  std::string stored;
  for (const auto& [dtype, bytes] : json.at("tensor_bytes").items()) {
    stored += (stored.empty() ? "" : ", ") + dtype + " " + format_bytes(bytes.get<double>());
  }
  print_line("weights", number(json, "n_tensors") + " tensors, " + stored);
  if (const Json& quantised = json.at("quantised"); !quantised.is_null()) {
    std::string matrices;
    for (const auto& [kept, n] : quantised.at("matrices").items()) {
      matrices += (matrices.empty() ? "" : "; ") + n.dump() + " x " + kept;
    }
    print_line("quantised", quantised.at("method").get<std::string>() + ", " + matrices);
  }
  const std::string weights = json.at("weights").get<std::string>();
  if (weights != "auto") {
    const double bytes = json.at("memory").at("weights_bytes").get<double>();
    print_line("loaded", "as " + weights + ", " + format_bytes(bytes));
  }
  print_line("device", json.at("device").get<std::string>() + ": " +
                           json.at("device_description").get<std::string>() + ", arithmetic " +
                           json.at("dtype").get<std::string>());
  const Json& tokenizer = json.at("tokenizer");
  if (tokenizer.is_null()) {
    print_line("tokenizer", "none");
  } else {
    print_line("tokenizer", number(tokenizer, "vocab_size") + " tokens, " +
                                std::to_string(tokenizer.at("special_tokens").size()) +
                                " special; a text begins with " + dump(tokenizer.at("prefix")) +
                                ", ends with " + dump(config.at("eos_token_ids")));
  }
}

// "temperature 0.6, top_p 0.9 of the folder; top_k 40, min_p 0.05"
void print_sampling(const Json& sampling) {
  const Json& from_folder = sampling.at("from_folder");
  std::string own, usual;
  for (const auto& [name, value] : sampling.items()) {
    if (name == "from_folder") continue;
    const bool is_own =
        std::find(from_folder.begin(), from_folder.end(), name) != from_folder.end();
    const bool off = name.find("penalty") != std::string::npos;  // not worth a word where usual
    if (!is_own && off) continue;
    std::string& list = is_own ? own : usual;
    list += (list.empty() ? "" : ", ") + name + " " + value.dump();
  }
  if (!own.empty()) own += " of the folder";
  print_line("sampling", own + (own.empty() || usual.empty() ? "" : "; ") + usual);
}

void print_cache(const Json& json) {
  std::printf("\n| %-18s | %12s | %9s | %12s |\n", "KV cache", "bytes/token", "of dense",
              "16K tokens");
  std::printf("|%s|%s:|%s:|%s:|\n", std::string(20, '-').c_str(), std::string(13, '-').c_str(),
              std::string(10, '-').c_str(), std::string(13, '-').c_str());
  for (const Json& row : json.at("kv_cache")) {
    const double bytes = row.at("bytes_per_token").get<double>();
    std::printf("| %-18s | %12s | %8s%% | %12s |\n", row.at("setting").get<std::string>().c_str(),
                format_number(bytes, 0).c_str(),
                format_number(100 * row.at("of_dense").get<double>(), 1).c_str(),
                format_bytes(kTableTokens * bytes).c_str());
  }
}

void print_tensors(const Json& tensors) {
  std::printf("\n");
  for (const Json& tensor : tensors) {
    std::printf("%-56s %-5s %s\n", tensor.at("name").get<std::string>().c_str(),
                tensor.at("dtype").get<std::string>().c_str(), dump(tensor.at("shape")).c_str());
  }
}

int info(const Options& options) {
  options.cache.validate();
  const InterruptGuard guard;
  const Json json = collect(options);
  if (options.json) {
    std::printf("%s\n", dump(json, 2).c_str());
    return kExitOk;
  }
  print_model(json);
  print_sampling(json.at("sampling"));
  print_cache(json);
  if (options.tensors) print_tensors(json.at("tensors"));
  return kExitOk;
}

}  // namespace

void add_info(CLI::App& app, Run& run) {
  const auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("info", "Show a model's shape, tokenizer, memory and cache sizes");
  options->model.add_to(*command);
  options->cache.add_to(*command);
  command->add_flag("--tensors", options->tensors, "List every tensor");
  command->add_flag("--json", options->json, "JSON instead of text");
  command->callback([options, &run] { run = [options] { return info(*options); }; });
}

}  // namespace mustafar::cli
