// `mustafar perplexity`: what pruning costs, measured on a text. Every chunk is scored as decode
// would see it: each token attends to what would have been compressed by then in compressed form.
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/options.h"
#include "cli/quality.h"
#include "cli/report.h"
#include "cli/terminal.h"
#include "mustafar/profile.h"

namespace mustafar::cli {
namespace {

using Json = nlohmann::ordered_json;

struct Options {
  ModelFlags model;
  CacheFlags cache;
  std::string file;
  int64_t chunk_tokens = 512;
  int64_t max_chunks = -1;  // -1: all
  bool sweep = false;
  std::vector<std::string> sparsities = {"0", "0.5", "0.625/0.75", "0.7"};
  std::vector<std::string> value_dtypes = {"auto", "int8", "int4"};
  std::vector<std::string> profiles = {"none", "hadamard"};
  bool json = false;
};

struct Setting {
  KVConfig config;
  std::string profile = "none";
};

Json to_json(const Model& model, const Setting& setting, const Figures& figures) {
  Json row = {{"config", cli::to_json(setting.config)}, {"profile", setting.profile}};
  row.update(store_json(model, setting.config));
  row.update(cli::to_json(figures));
  return row;
}

void print_one(const Json& row) {
  const auto number = [&](const char* key) { return row.at(key).get<double>(); };
  std::printf("Final estimate: PPL = %.4f +/- %.5f\n", number("ppl"), number("ppl_error"));
  std::printf("KLD against the dense cache: mean %.6f +/- %.6f, median %.6f, 99.9%% %.6f\n",
              number("kld_mean"), number("kld_mean_error"), number("kld_median"),
              number("kld_99_9"));
  std::printf("Same top p: %.3f +/- %.3f %%\n", 100 * number("same_top_p"),
              100 * number("same_top_p_error"));
  std::printf("KV store: %.1f bytes per token, %.1f %% of dense at 2 bytes a value\n",
              number("bytes_per_token"), 100 * number("of_dense"));
}

void print_table(const Json& rows) {
  std::printf(
      "| K sparsity | V sparsity | pattern | values | profile | bytes/token | of dense | PPL | "
      "KLD mean | median | 99.9 %% | same top p |\n"
      "|---:|---:|---|---|---|---:|---:|---:|---:|---:|---:|---:|\n");
  for (const Json& row : rows) {
    const auto number = [&](const char* key) { return row.at(key).get<double>(); };
    const Json& config = row.at("config");
    std::printf(
        "| %.3f | %.3f | %s | %s | %s | %.0f | %.1f %% | %.4f ± %.4f | %.5f ± %.5f | %.5f | %.4f | "
        "%.2f ± %.2f %% |\n",
        number("k_sparsity"), number("v_sparsity"), config.at("pattern").get<std::string>().c_str(),
        config.at("value_dtype").get<std::string>().c_str(),
        row.at("profile").get<std::string>().c_str(), number("bytes_per_token"),
        100 * number("of_dense"), number("ppl"), number("ppl_error"), number("kld_mean"),
        number("kld_mean_error"), number("kld_median"), number("kld_99_9"),
        100 * number("same_top_p"), 100 * number("same_top_p_error"));
  }
}

// "0.5", or "0.625/0.75" for keys and values apart.
void set_sparsity(KVConfig& config, const std::string& text) {
  const auto parse = [&](const std::string& number) {
    size_t used = 0;
    double value = 0;
    try {
      value = std::stod(number, &used);
    } catch (const std::exception&) {
      used = 0;
    }
    if (used == 0 || used != number.size()) {
      throw std::invalid_argument("sparsity \"" + text + "\" is not a number, nor two with a /");
    }
    return value;
  };
  const size_t slash = text.find('/');
  config.k_sparsity = parse(text.substr(0, slash));
  config.v_sparsity =
      slash == std::string::npos ? config.k_sparsity : parse(text.substr(slash + 1));
  config.validate();
}

std::vector<Setting> settings_of(const Options& options, const Model& model) {
  const KVConfig base = options.cache.resolve(model);
  if (!options.sweep) {
    return {{base, options.cache.profile_name()}};
  }
  std::vector<Setting> settings;
  for (const std::string& name : options.profiles) {
    const auto profile = resolve_profile(name, model);
    for (const std::string& sparsity : options.sparsities) {
      for (const std::string& dtype : options.value_dtypes) {
        Setting setting{base, name};
        set_sparsity(setting.config, sparsity);
        setting.config.value_dtype = parse_value_type(dtype);
        setting.config.profile = profile;
        settings.push_back(std::move(setting));
      }
    }
  }
  return settings;
}

int perplexity(const Options& options) {
  options.cache.validate();
  const InterruptGuard guard;
  const Model model = options.model.load();
  const std::vector<Setting> settings = settings_of(options, model);
  const auto chunks = chunks_of(model, read_text(options.file), options.file, options.chunk_tokens,
                                options.max_chunks);
  std::vector<KVConfig> configs;
  for (const Setting& setting : settings) configs.push_back(setting.config);
  Progress bar("scoring");
  const Quality quality = measure_quality(model, configs, chunks, [&](int64_t done, int64_t total) {
    throw_if_interrupted();
    bar.update(done, total);
  });
  bar.clear();

  const Json dense = to_json(model, {dense_setting(), "none"}, quality.dense);
  Json rows = Json::array();
  for (size_t i = 0; i < settings.size(); i++) {
    rows.push_back(to_json(model, settings[i], quality.settings[i]));
  }
  if (options.json) {
    const Json out = {
        {"model", model.folder().string()}, {"file", options.file}, {"chunks", chunks.size()},
        {"chunk_tokens", chunks[0].size()}, {"dense", dense},       {"results", rows}};
    std::printf("%s\n", dump(out, 2).c_str());
    return kExitOk;
  }
  std::printf("%zu chunks of %zu tokens; dense cache: PPL = %.4f +/- %.5f\n", chunks.size(),
              chunks[0].size(), dense.at("ppl").get<double>(), dense.at("ppl_error").get<double>());
  if (options.sweep) {
    print_table(rows);
  } else {
    print_one(rows[0]);
  }
  return kExitOk;
}

}  // namespace

void add_perplexity(CLI::App& app, Run& run) {
  const auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand(
      "perplexity", "Measure what a cache setting costs on a text: PPL, KL divergence, bytes");
  options->model.add_to(*command);
  options->cache.add_to(*command);
  command->add_option("-f,--file", options->file, "Text file, or - for standard input")->required();
  command->add_option("-c,--ctx-size", options->chunk_tokens, "Tokens per chunk")
      ->check(CLI::Range(int64_t{4}, int64_t{1} << 30));
  command->add_option("--chunks", options->max_chunks, "Chunks to score at most (-1: all)");
  command->add_flag("--sweep", options->sweep, "Every combination of the three lists below");
  command->add_option("--sparsities", options->sparsities, "Comma list; K/V for the two apart")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--kv-dtypes", options->value_dtypes, "Comma list")
      ->delimiter(',')
      ->capture_default_str();
  command
      ->add_option("--profiles", options->profiles,
                   "Comma list: none, auto, hadamard, model, files")
      ->delimiter(',')
      ->capture_default_str();
  command->add_flag("--json", options->json, "JSON instead of text");
  command->callback([options, &run] { run = [options] { return perplexity(*options); }; });
}

}  // namespace mustafar::cli
