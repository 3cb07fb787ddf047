// `mustafar perplexity`: what pruning costs, measured on a text. Every chunk is scored as decode
// would see it: each token attends to what would have been compressed by then in compressed form.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/options.h"
#include "cli/report.h"
#include "cli/terminal.h"
#include "kv/sequence_cache.h"
#include "mustafar/error.h"
#include "mustafar/profile.h"
#include "mustafar/session.h"
#include "runtime/model_impl.h"

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

// Per-token figures of one cache setting over all chunks.
struct Figures {
  std::vector<double> nll;         // nats, of the text's own next token
  std::vector<double> divergence;  // nats, KL of the dense cache's distribution from this one
  int64_t same_top = 0;            // tokens whose most probable successor is the dense cache's
};

struct Setting {
  KVConfig config;
  std::string profile = "none";
  Figures figures;
};

// Natural log-softmax of one row, in place.
void log_softmax(std::span<const float> logits, std::vector<float>& out) {
  const float top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (float x : logits) sum += std::exp(static_cast<double>(x) - top);
  const float shift = static_cast<float>(top + std::log(sum));
  out.resize(logits.size());
  for (size_t i = 0; i < logits.size(); i++) out[i] = logits[i] - shift;
}

int64_t top_of(std::span<const float> values) {
  return std::max_element(values.begin(), values.end()) - values.begin();
}

// The dense cache's log-probabilities of one chunk, [tokens - 1][vocab].
class Baseline {
 public:
  void score(const Session& dense, std::span<const int32_t> chunk, Figures* figures) {
    rows_.clear();
    dense.score_logits(chunk, [&](int64_t position, std::span<const float> logits) {
      rows_.emplace_back();
      log_softmax(logits, rows_.back());
      if (figures != nullptr) add(*figures, rows_.back(), chunk[position + 1], rows_.back());
    });
  }
  void compare(const Session& session, std::span<const int32_t> chunk, Figures& figures) {
    session.score_logits(chunk, [&](int64_t position, std::span<const float> logits) {
      log_softmax(logits, row_);
      add(figures, row_, chunk[position + 1], rows_[position]);
    });
  }

 private:
  static void add(Figures& figures, std::span<const float> row, int32_t next,
                  std::span<const float> dense) {
    figures.nll.push_back(-row[next]);
    double divergence = 0;
    for (size_t i = 0; i < row.size(); i++) {
      divergence +=
          std::exp(static_cast<double>(dense[i])) * (static_cast<double>(dense[i]) - row[i]);
    }
    figures.divergence.push_back(std::max(divergence, 0.0));
    figures.same_top += top_of(row) == top_of(dense);
  }

  std::vector<std::vector<float>> rows_;
  std::vector<float> row_;
};

double mean(const std::vector<double>& x) {
  return std::accumulate(x.begin(), x.end(), 0.0) / static_cast<double>(x.size());
}

// Standard error of the mean.
double error_of(const std::vector<double>& x) {
  if (x.size() < 2) return 0;
  const double m = mean(x);
  double squares = 0;
  for (double value : x) squares += (value - m) * (value - m);
  const double n = static_cast<double>(x.size());
  return std::sqrt(squares / (n - 1) / n);
}

double quantile(std::vector<double> x, double q) {
  const size_t at = static_cast<size_t>(q * static_cast<double>(x.size() - 1) + 0.5);
  std::nth_element(x.begin(), x.begin() + at, x.end());
  return x[at];
}

Json to_json(const Model& model, const Setting& setting) {
  const Figures& f = setting.figures;
  const ModelConfig& c = model.config();
  const CacheSpec spec = make_cache_spec(c, model.impl()->dtype, setting.config);
  const double bytes = static_cast<double>(spec.layout.page_bytes) / kBlockTokens;
  const double dense = 4.0 * c.n_layers * c.n_kv_heads * c.head_dim;
  const double perplexity = std::exp(mean(f.nll));
  const double same = static_cast<double>(f.same_top) / static_cast<double>(f.nll.size());
  return {{"config", cli::to_json(setting.config)},
          {"profile", setting.profile},
          {"tokens", f.nll.size()},
          {"bytes_per_token", bytes},
          {"of_dense", bytes / dense},
          {"k_sparsity", 1.0 - static_cast<double>(spec.layout.k.row_keep) / c.head_dim},
          {"v_sparsity", 1.0 - static_cast<double>(spec.layout.v.row_keep) / c.head_dim},
          {"ppl", perplexity},
          {"ppl_error", perplexity * error_of(f.nll)},
          {"kld_mean", mean(f.divergence)},
          {"kld_mean_error", error_of(f.divergence)},
          {"kld_median", quantile(f.divergence, 0.5)},
          {"kld_99_9", quantile(f.divergence, 0.999)},
          {"same_top_p", same},
          {"same_top_p_error", std::sqrt(same * (1 - same) / static_cast<double>(f.nll.size()))}};
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
    return {{base, options.cache.profile_name(), {}}};
  }
  std::vector<Setting> settings;
  for (const std::string& name : options.profiles) {
    const auto profile = Profile::resolve(name, model);
    for (const std::string& sparsity : options.sparsities) {
      for (const std::string& dtype : options.value_dtypes) {
        Setting setting{base, name, {}};
        set_sparsity(setting.config, sparsity);
        setting.config.value_dtype = parse_value_type(dtype);
        setting.config.profile = profile;
        settings.push_back(std::move(setting));
      }
    }
  }
  return settings;
}

std::vector<std::vector<int32_t>> chunks_of(const Options& options, const Model& model) {
  const Tokenizer& tokenizer = model.tokenizer();
  const std::vector<int32_t> prefix = tokenizer.special_prefix();
  const std::vector<int32_t> ids = tokenizer.encode(read_text(options.file), false);
  const int64_t size =
      std::min<int64_t>(options.chunk_tokens, model.config().max_position_embeddings);
  const int64_t step = size - static_cast<int64_t>(prefix.size());
  if (step < 2) throw std::invalid_argument("-c is " + std::to_string(size) + " tokens: too few");
  std::vector<std::vector<int32_t>> chunks;
  const int64_t n = static_cast<int64_t>(ids.size());
  for (int64_t at = 0; at + step <= n; at += step) {
    if (options.max_chunks >= 0 && static_cast<int64_t>(chunks.size()) == options.max_chunks) break;
    chunks.push_back(prefix);
    chunks.back().insert(chunks.back().end(), ids.begin() + at, ids.begin() + at + step);
  }
  if (chunks.empty()) {
    throw std::invalid_argument(options.file + " has " + std::to_string(n) +
                                " tokens, fewer than one chunk of " + std::to_string(step) +
                                ": give a longer text or a smaller -c");
  }
  return chunks;
}

int perplexity(const Options& options) {
  options.cache.validate();
  const InterruptGuard guard;
  const Model model = options.model.load();
  std::vector<Setting> settings = settings_of(options, model);
  const auto chunks = chunks_of(options, model);

  KVConfig dense_config;
  dense_config.sparsity = 0;
  const auto session_with = [&](const KVConfig& config) {
    auto session = std::make_unique<Session>(model, config);
    session->set_interrupt_check(throw_if_interrupted);
    return session;
  };
  const auto dense = session_with(dense_config);
  std::vector<std::unique_ptr<Session>> sessions;
  for (const Setting& setting : settings) sessions.push_back(session_with(setting.config));

  Setting baseline_setting{dense_config, "none", {}};
  Baseline baseline;
  Progress progress("scoring");
  const int64_t total = static_cast<int64_t>(chunks.size() * (settings.size() + 1));
  int64_t done = 0;
  for (const auto& chunk : chunks) {
    baseline.score(*dense, chunk, &baseline_setting.figures);
    progress.update(++done, total);
    for (size_t i = 0; i < settings.size(); i++) {
      baseline.compare(*sessions[i], chunk, settings[i].figures);
      progress.update(++done, total);
    }
  }
  progress.clear();

  Json rows = Json::array();
  for (const Setting& setting : settings) rows.push_back(to_json(model, setting));
  if (options.json) {
    const Json out = {{"model", model.folder().string()},
                      {"file", options.file},
                      {"chunks", chunks.size()},
                      {"chunk_tokens", chunks[0].size()},
                      {"dense", to_json(model, baseline_setting)},
                      {"results", rows}};
    std::printf("%s\n", dump(out, 2).c_str());
    return kExitOk;
  }
  std::printf(
      "%zu chunks of %zu tokens; dense cache: PPL = %.4f +/- %.5f\n", chunks.size(),
      chunks[0].size(), std::exp(mean(baseline_setting.figures.nll)),
      std::exp(mean(baseline_setting.figures.nll)) * error_of(baseline_setting.figures.nll));
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
  command->add_option("--profiles", options->profiles, "Comma list: none, hadamard, files")
      ->delimiter(',')
      ->capture_default_str();
  command->add_flag("--json", options->json, "JSON instead of text");
  command->callback([options, &run] { run = [options] { return perplexity(*options); }; });
}

}  // namespace mustafar::cli
