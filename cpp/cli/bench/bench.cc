// `mustafar bench`: prefill and decode speed over depths and cache settings, each with the share of
// the machine's memory bandwidth that it reaches.
//
// The cache settings of one test take turns, repetition by repetition, so that a machine that slows
// down or speeds up meanwhile does so for all of them.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cli/bench/break_even.h"
#include "cli/bench/engine.h"
#include "cli/bench/machine.h"
#include "cli/bench/options.h"
#include "cli/bench/shapes.h"
#include "cli/bench/table.h"
#include "cli/commands.h"
#include "cli/demo_model.h"
#include "cli/interrupt.h"
#include "cli/options.h"
#include "cli/report.h"
#include "cli/terminal.h"
#include "core/thread_pool.h"
#include "mustafar/error.h"
#include "mustafar/profile.h"
#include "runtime/model_impl.h"

namespace mustafar::cli {
namespace {

using Clock = std::chrono::steady_clock;
using Json = nlohmann::ordered_json;

// A cache setting's filled sessions, of each replica as many as decode together, and what one of
// them reads and holds.
struct Filled {
  std::vector<std::vector<Session>> replicas;
  int64_t bytes_read = 0;
  MemoryUsage memory;
};

class Bench {
 public:
  explicit Bench(const BenchOptions& options)
      : options_(options),
        settings_(make_settings(options)),
        tests_(make_tests(options)),
        table_(options.json ? "json" : options.format) {
    if (options.repetitions < 1) {
      throw std::invalid_argument("-r must be at least 1, not " +
                                  std::to_string(options.repetitions));
    }
    for (const int32_t n : options.threads) {
      if (n < 0)
        throw std::invalid_argument("-t must be 0 (the default) or more, not " + std::to_string(n));
    }
  }

  int run() {
    for (const std::string& shape : options_.shapes)
      parse_shape(shape);  // all names, before any work
    for (const std::string& shape : options_.shapes) run_shape(shape);
    std::vector<std::string> models = options_.models;
    if (models.empty() && options_.shapes.empty()) models.push_back(demo_model_folder().string());
    for (const std::string& folder : models) run_folder(folder);
    for (const Json& row : break_evens_) table_.add_extra(row);
    table_.finish();
    return kExitOk;
  }

 private:
  void run_shape(const std::string& shape);
  void run_folder(const std::string& folder);
  void run_model(const std::string& name, const ModelConfig& config,
                 std::shared_ptr<const TensorSource> source);
  void run_depth(Engine& engine, int64_t depth, int64_t n_batch);
  Filled fill(Engine& engine, const BenchSetting& setting, int64_t depth, int64_t n_batch);
  int replicas_for(Engine& engine, const Session& session, int64_t n_batch) const;
  double measure(Filled& filled, const BenchTest& test, int first);
  double measure_batch(Filled& filled, const BenchTest& test, int first);
  void report(Engine& engine, const BenchSetting& setting, const Filled& filled,
              const BenchTest& test, int64_t depth, std::vector<double> samples);
  void report_break_even(const Engine& engine, const std::vector<int64_t>& depths);

  const BenchOptions& options_;
  const std::vector<BenchSetting> settings_;
  const std::vector<BenchTest> tests_;
  BenchTable table_;
  int threads_ = 0;
  double bandwidth_ = 0;  // bytes/s with threads_
  int64_t cache_bytes_ = last_level_cache_bytes();
  // Of the model that is measured: [setting][depth], median ns of a decode step.
  std::vector<std::vector<double>> step_ns_;
  std::vector<Json> break_evens_;
};

void Bench::run_shape(const std::string& shape) {
  const ModelConfig config = parse_shape(shape);
  const DType dtype = options_.dtype == "f32"   ? DType::kF32
                      : options_.dtype == "f16" ? DType::kF16
                                                : DType::kBF16;
  run_model(shape, config, random_tensors(config, dtype, /*seed=*/1));
}

void Bench::run_folder(const std::string& folder) {
  ModelFlags flags;
  flags.folder = folder;
  flags.device = options_.device;
  flags.dtype = options_.dtype;
  flags.weights = options_.weights;
  const Model model = flags.load();
  std::filesystem::path path(folder);
  if (!path.has_filename()) path = path.parent_path();
  run_model(path.filename().string(), model.config(), model.impl()->source);
}

void Bench::run_model(const std::string& name, const ModelConfig& config,
                      std::shared_ptr<const TensorSource> source) {
  for (const int32_t threads : options_.threads) {
    threads_ = ThreadPool(threads).size();
    ModelOptions model_options;
    model_options.device = options_.device;
    model_options.dtype = options_.dtype;
    model_options.weights = options_.weights;
    model_options.threads = threads_;
    Engine engine(name, config, source, model_options);
    const bool on_host = engine.model().impl()->backend->host_memory();
    bandwidth_ = on_host ? measure_read_bandwidth(threads_) : 0;
    if (bandwidth_ > 0) {
      std::fprintf(stderr, "%s, %d threads: reads %.1f GB/s; last-level cache %s\n",
                   cpu_name().c_str(), threads_, bandwidth_ / 1e9,
                   format_bytes(static_cast<double>(cache_bytes_)).c_str());
    }
    std::vector<int64_t> depths = options_.depths;
    if (depths.empty()) {
      depths = options_.break_even ? std::vector<int64_t>{0, 1024, 4096, 16384}
                                   : std::vector<int64_t>{0};
    }
    const std::set<int64_t> batches(options_.batches.begin(), options_.batches.end());
    step_ns_.assign(settings_.size(), {});
    for (const int64_t depth : depths) {
      for (const int64_t n_batch : batches) run_depth(engine, depth, n_batch);
    }
    if (options_.break_even) report_break_even(engine, depths);
  }
}

int Bench::replicas_for(Engine& engine, const Session& session, int64_t n_batch) const {
  constexpr int64_t kMost = 64;
  if (options_.no_rotate || !engine.model().impl()->backend->host_memory()) return 1;
  const int64_t one = engine.bytes_read_per_step() + n_batch * cache_bytes_read(session);
  return static_cast<int>(std::clamp<int64_t>((4 * cache_bytes_ + one - 1) / one, 1, kMost));
}

// For random weights, which no text can calibrate: as much work as a calibrated profile, and bits
// that are dealt as unevenly.
std::shared_ptr<const Profile> stand_in_profile(const ModelConfig& config) {
  auto profile = std::make_shared<Profile>(*Profile::hadamard(config));
  const int64_t rows = int64_t{config.n_layers} * config.n_kv_heads;
  for (int64_t row = 0; row < rows; row++) {
    for (int32_t d = 0; d < config.head_dim; d++) {
      constexpr float kOctaves = 5.0f;  // between a row's strongest dim and its weakest
      profile->k_sigma.push_back(
          std::exp2(-kOctaves * static_cast<float>(d) / static_cast<float>(config.head_dim)));
    }
  }
  profile->v_sigma = profile->k_sigma;
  return profile;
}

Filled Bench::fill(Engine& engine, const BenchSetting& setting, int64_t depth, int64_t n_batch) {
  Filled filled;
  int replicas = 1;
  for (int i = 0; i < replicas; i++) {
    throw_if_interrupted();
    const Model& model = engine.model(i);
    KVConfig kv = setting.config;
    kv.profile = setting.profile == "auto" && !model.has_tokenizer()
                     ? stand_in_profile(model.config())
                     : resolve_profile(setting.profile, model, kv.budgeted());
    std::vector<Session> sessions;
    for (int64_t j = 0; j < n_batch; j++) sessions.emplace_back(model, kv);
    if (options_.fill == "prefill" && depth > 0) {
      std::vector<int32_t> ids(depth);
      for (int64_t j = 0; j < depth; j++) {
        ids[j] = static_cast<int32_t>(j * 7919 % model.config().vocab_size);
      }
      for (Session& session : sessions) {
        session.set_interrupt_check(throw_if_interrupted);
        session.prefill(ids);
      }
    } else {
      fill_sessions(sessions, depth, /*seed=*/static_cast<uint64_t>(i) + 1);
    }
    if (i == 0) {
      replicas = replicas_for(engine, sessions[0], n_batch);
      filled.bytes_read = cache_bytes_read(sessions[0]);
      filled.memory = sessions[0].memory();
    }
    filled.replicas.push_back(std::move(sessions));
  }
  return filled;
}

// Nanoseconds of one sample. Works on forks, so that every sample starts from the same depth; steps
// go round the replicas.
double Bench::measure(Filled& filled, const BenchTest& test, int first) {
  throw_if_interrupted();
  if (test.n_batch > 1) return measure_batch(filled, test, first);
  const int n = static_cast<int>(filled.replicas.size());
  const int32_t vocab = filled.replicas[0][0].model().config().vocab_size;
  const auto token = [&](int64_t i) { return static_cast<int32_t>((i * 104729 + 17) % vocab); };
  if (test.n_prompt > 0) {
    Session session = filled.replicas[first % n][0].fork();
    session.set_interrupt_check(throw_if_interrupted);
    std::vector<int32_t> ids(test.n_prompt);
    for (int64_t i = 0; i < test.n_prompt; i++) ids[i] = token(i);
    const auto start = Clock::now();
    session.prefill(ids);
    for (int64_t i = 0; i < test.n_gen; i++) session.decode(token(i));
    return std::chrono::duration<double, std::nano>(Clock::now() - start).count();
  }
  std::vector<Session> sessions;
  for (const std::vector<Session>& base : filled.replicas) {
    sessions.push_back(base[0].fork());
    sessions.back().set_interrupt_check(throw_if_interrupted);
    sessions.back().decode(token(0));  // a fork's first step also makes its scratch memory
  }
  const auto start = Clock::now();
  for (int64_t i = 0; i < test.n_gen; i++) sessions[(first + i) % n].decode(token(i));
  return std::chrono::duration<double, std::nano>(Clock::now() - start).count();
}

double Bench::measure_batch(Filled& filled, const BenchTest& test, int first) {
  const int n = static_cast<int>(filled.replicas.size());
  std::vector<std::vector<Session>> sessions(n);
  std::vector<BatchStep> steps;
  steps.reserve(n);
  for (int i = 0; i < n; i++) {
    for (const Session& base : filled.replicas[i]) sessions[i].push_back(base.fork());
    steps.emplace_back(filled.replicas[i][0].model());
    // The first step makes scratch memory, a GPU records the second.
    for (int warm = 0; warm < 2; warm++) steps[i].run(sessions[i], 1);
  }
  const auto start = Clock::now();
  for (int64_t i = 0; i < test.n_gen; i++) {
    throw_if_interrupted();
    steps[(first + i) % n].run(sessions[(first + i) % n], 1);
  }
  return std::chrono::duration<double, std::nano>(Clock::now() - start).count();
}

void Bench::run_depth(Engine& engine, int64_t depth, int64_t n_batch) {
  // What is not decode alone is measured once a depth, with the first batch.
  std::vector<BenchTest> tests;
  for (const BenchTest& test : tests_) {
    const bool decodes = test.n_prompt == 0;
    if ((decodes ? test.n_batch : options_.batches[0]) == n_batch) tests.push_back(test);
  }
  if (tests.empty()) return;
  Progress bar("filling to depth " + std::to_string(depth));
  std::vector<Filled> filled;
  for (size_t s = 0; s < settings_.size(); s++) {
    bar.update(static_cast<int64_t>(s), static_cast<int64_t>(settings_.size()));
    filled.push_back(fill(engine, settings_[s], depth, n_batch));
  }
  bar.clear();
  for (const BenchTest& test : tests) {
    constexpr int64_t kWarmupPrompt = 512;
    std::vector<std::vector<double>> samples(settings_.size());
    Progress progress("measuring");
    for (size_t s = 0; s < settings_.size() && !options_.no_warmup; s++) {
      measure(
          filled[s],
          {std::min(test.n_prompt, kWarmupPrompt), std::min<int64_t>(test.n_gen, 2), test.n_batch},
          0);
    }
    for (int r = 0; r < options_.repetitions; r++) {
      for (size_t s = 0; s < settings_.size(); s++) {
        progress.update(r * static_cast<int64_t>(settings_.size()) + static_cast<int64_t>(s),
                        options_.repetitions * static_cast<int64_t>(settings_.size()));
        samples[s].push_back(measure(filled[s], test, r));
      }
    }
    progress.clear();
    for (size_t s = 0; s < settings_.size(); s++) {
      report(engine, settings_[s], filled[s], test, depth, std::move(samples[s]));
    }
  }
}

void Bench::report(Engine& engine, const BenchSetting& setting, const Filled& filled,
                   const BenchTest& test, int64_t depth, std::vector<double> samples) {
  const Model& model = engine.model();
  // Rows of a prompt that share one reading of the weights (Backend::prefill_rows).
  const double rows_together = model.device() == "cpu" ? 512 : 2048;
  BenchRow row;
  row.model = engine.name();
  row.model_size = engine.stored_bytes();
  row.model_n_params = engine.parameters();
  row.backend = model.device();
  row.device = model.device_description();
  row.n_threads = threads_;
  row.kv = setting.name;
  row.kv_config = to_json(setting.config);
  row.kv_config["profile"] = setting.profile;
  row.kv_bytes = filled.memory.allocated;
  row.kv_dense_bytes = filled.memory.dense_equivalent;
  row.n_prompt = test.n_prompt;
  row.n_gen = test.n_gen;
  row.n_depth = depth;
  row.n_batch = test.n_batch;
  row.samples_ns = std::move(samples);
  row.bytes_per_pass =
      static_cast<double>(engine.bytes_read_per_step() + test.n_batch * filled.bytes_read);
  row.passes = std::ceil(static_cast<double>(test.n_prompt) / rows_together) +
               static_cast<double>(test.n_gen);
  row.replicas = static_cast<int>(filled.replicas.size());
  row.working_set = static_cast<int64_t>(row.bytes_per_pass) * row.replicas;
  row.read_bandwidth = bandwidth_;
  table_.add(row);
  if (test.n_prompt == 0) {
    const size_t s = static_cast<size_t>(&setting - settings_.data());
    step_ns_[s].push_back(row.median_ns() / static_cast<double>(test.n_gen));
  }
}

void Bench::report_break_even(const Engine& engine, const std::vector<int64_t>& depths) {
  const size_t tests_per_depth = tests_.size();  // decode tests only
  std::vector<double> x;
  for (const int64_t depth : depths) x.insert(x.end(), tests_per_depth, static_cast<double>(depth));
  const auto is_dense = [](const BenchSetting& setting) { return setting.dense; };
  const size_t reference = static_cast<size_t>(
      std::find_if(settings_.begin(), settings_.end(), is_dense) - settings_.begin());
  const DepthFit dense = fit_depth(x, step_ns_[reference]);
  for (size_t s = 0; s < settings_.size(); s++) {
    const DepthFit fit = fit_depth(x, step_ns_[s]);
    const double depth = break_even_depth(dense, fit);
    Json row = {{"test", "break-even"},
                {"model", engine.name()},
                {"n_threads", threads_},
                {"kv", settings_[s].name},
                {"us_per_step_at_depth_0", std::round(fit.base_ns / 10) / 100},
                {"us_per_1024_tokens_of_depth", std::round(fit.ns_per_token * 102.4) / 100},
                {"speedup_at_greatest_depth",
                 std::round(100 * step_ns_[reference].back() / step_ns_[s].back()) / 100}};
    if (s == reference) {
      row["faster_than_dense_from"] = "is the dense cache";
    } else if (dense.ns_per_token <= 0) {  // depth can't make the dense cache faster
      row["faster_than_dense_from"] = "lost in the noise";
    } else if (depth < 0) {
      row["faster_than_dense_from"] = "never";
    } else {
      row["faster_than_dense_from"] = std::ceil(depth);
    }
    break_evens_.push_back(std::move(row));
  }
}

}  // namespace

void add_bench(CLI::App& app, Run& run) {
  const auto options = std::make_shared<BenchOptions>();
  CLI::App* command = app.add_subcommand("bench", "Measure prefill and decode speed");
  const auto list = [command](const char* name, auto& values, const char* help) {
    command->add_option(name, values, help)
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
        ->allow_extra_args(false)
        ->delimiter(',')
        ->capture_default_str();
  };
  list("-m,--model", options->models, "Model folders; without: the demo model, unless --shape");
  list("--shape", options->shapes,
       "Random weights of a known shape: llama-3.2-1b, or llama-3-8b:2 for two layers");
  add_device_option(*command, options->device);
  command->add_option("--dtype", options->dtype, "auto, f32, f16, bf16; of a shape's weights, too")
      ->check(CLI::IsMember({"auto", "f32", "f16", "bf16"}))
      ->capture_default_str();
  add_weights_option(*command, options->weights);
  list("-t,--threads", options->threads, "CPU threads; 0: what cores and CPU quota allow");
  list("-p,--n-prompt", options->n_prompt, "Tokens of prefill; 0: no such test");
  list("-n,--n-gen", options->n_gen, "Tokens of decode; 0: no such test");
  command->add_option("--pg", options->prompt_gen, "PROMPT,GENERATED in one test (also -pg)")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->allow_extra_args(false);
  list("-d,--n-depth", options->depths, "Tokens in the cache before the test");
  list("-b,--batch", options->batches, "Sequences that decode together, each -n tokens");
  command->add_option("-r,--repetitions", options->repetitions, "Samples of every test")
      ->capture_default_str();
  command->add_option("-o,--output", options->format, "md, csv, json or jsonl")
      ->capture_default_str();
  command->add_flag("--json", options->json, "The same as -o json");
  command->add_option("--kv", options->presets, "Settings by name, instead of the two lists below")
      ->delimiter(',');
  list("--sparsity", options->sparsities, "Sparsities S or K/V, as in 0,0.5,0.625/0.75");
  list("--kv-dtype", options->kv_dtypes, "Stored values: auto, f32, f16, bf16, int8, int4");
  command->add_option("--pattern", options->pattern, "group or row")->capture_default_str();
  command->add_option("--window", options->window, "Newest tokens that stay dense")
      ->capture_default_str();
  command->add_option("--sinks", options->sinks, "First tokens that stay dense")
      ->capture_default_str();
  command->add_option("--profile", options->profile,
                      "KV transform: auto, hadamard, model (the folder's own), or a file");
  command
      ->add_option("--fill", options->fill,
                   "How the depth comes about: random keys and values, or the prefill of tokens")
      ->check(CLI::IsMember({"random", "prefill"}))
      ->capture_default_str();
  command->add_flag("--no-warmup", options->no_warmup, "Skip the runs that are not counted");
  command->add_flag("--no-rotate", options->no_rotate,
                    "One copy of the model even where it fits the processor's cache");
  command->add_flag("--break-even", options->break_even,
                    "Decode only: from which depth each setting beats the dense cache");
  command->callback([options, &run] {
    run = [options] {
      const InterruptGuard guard;
      return Bench(*options).run();
    };
  });
}

}  // namespace mustafar::cli
