#include "cli/options.h"

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>
#include <stdexcept>

#include "backend/device_name.h"
#include "cli/demo_model.h"
#include "cli/interrupt.h"
#include "cli/terminal.h"
#include "model/weight_format.h"
#include "mustafar/error.h"
#include "mustafar/profile.h"
#include "runtime/kv_fields.h"

namespace mustafar::cli {
namespace {

constexpr const char* kModelGroup = "Model";
constexpr const char* kCacheGroup = "KV cache";
constexpr const char* kSamplingGroup = "Sampling";

std::pair<int32_t, float> parse_bias(const std::string& text) {
  const size_t sign = text.find_first_of("+-", 1);
  try {
    if (sign == std::string::npos) throw std::invalid_argument(text);
    size_t id_end = 0;
    size_t bias_end = 0;
    const int id = std::stoi(text.substr(0, sign), &id_end);
    const float bias = std::stof(text.substr(sign), &bias_end);
    if (id_end != sign || bias_end != text.size() - sign) throw std::invalid_argument(text);
    return {id, bias};
  } catch (const std::exception&) {
    throw std::invalid_argument(
        "--logit-bias must be a token id and a signed number, as in 42+1.5, not \"" + text + "\"");
  }
}

std::string unescape(const std::string& text) {
  std::string out;
  for (size_t i = 0; i < text.size(); i++) {
    if (text[i] != '\\' || i + 1 == text.size()) {
      out += text[i];
      continue;
    }
    switch (text[++i]) {
      case 'n':
        out += '\n';
        break;
      case 't':
        out += '\t';
        break;
      case 'r':
        out += '\r';
        break;
      case '\\':
        out += '\\';
        break;
      case '"':
        out += '"';
        break;
      case '\'':
        out += '\'';
        break;
      default:
        out += '\\';
        out += text[i];
    }
  }
  return out;
}

}  // namespace

CLI::Option* add_device_option(CLI::App& command, std::string& device) {
  const auto check = [](const std::string& given) {
    return DeviceName::find(given)
               ? std::string()
               : std::string("expected ") + DeviceName::kForms + ", got \"" + given + "\"";
  };
  return command.add_option("--device", device, DeviceName::kForms)
      ->check(CLI::Validator(check, ""))
      ->capture_default_str();
}

CLI::Option* add_weights_option(CLI::App& command, std::string& weights) {
  return command
      .add_option("-w,--weights", weights,
                  "Weights in memory: auto (as stored), int8 or int4 (rounded on loading), "
                  "with another group of inputs to a scale than 32 as in int4:64 or int8:row")
      ->capture_default_str();
}

void ModelFlags::add_to(CLI::App& command) {
  command
      .add_option(
          "-m,--model", folder,
          "Model folder (config.json, safetensors, tokenizer.json), or ORGANISATION/NAME of "
          "a model in the Hugging Face cache; without: the small demo model")
      ->group(kModelGroup);
  add_device_option(command, device)->group(kModelGroup);
  command
      .add_option("--dtype", dtype, "Arithmetic and dense tail: auto (as stored), f32, f16, bf16")
      ->check(CLI::IsMember({"auto", "f32", "f16", "bf16"}))
      ->capture_default_str()
      ->group(kModelGroup);
  add_weights_option(command, weights)->group(kModelGroup);
  command.add_option("-t,--threads", threads, "CPU threads; 0: what cores and CPU quota allow")
      ->capture_default_str()
      ->group(kModelGroup);
  command
      .add_option("--kv-budget", kv_budget,
                  "Most bytes the KV cache may take, e.g. 512M; 0: no limit")
      ->transform(CLI::AsSizeValue(false))
      ->capture_default_str()
      ->group(kModelGroup);
}

ModelOptions ModelFlags::options() const {
  if (kv_budget > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
    throw std::invalid_argument("--kv-budget is more than 2^63 - 1 bytes");
  }
  parse_weight_format(weights);  // refused before a model is looked for
  ModelOptions options;
  options.device = device;
  options.dtype = dtype;
  options.weights = weights;
  options.threads = threads;
  options.kv_budget = static_cast<int64_t>(kv_budget);
  return options;
}

Model ModelFlags::load() const {
  Progress bar("loading");
  ModelOptions with_progress = options();
  with_progress.progress = [&bar](int64_t done, int64_t total) {
    throw_if_interrupted();
    bar.update(done, total);
  };
  return Model::load(folder.empty() ? demo_model_folder() : std::filesystem::path(folder),
                     with_progress);
}

void CacheFlags::add_to(CLI::App& command) {
  std::string presets;
  for (const KVPreset& known : kv_presets()) {
    presets += std::string(presets.empty() ? "" : "; ") + known.name + ": " + known.summary;
  }
  command
      .add_option("--kv", preset, "A setting by name, which the options below change. " + presets)
      ->capture_default_str()
      ->group(kCacheGroup);
  for_each_kv_field([&]<typename T>(const KVField<T>& field) {
    // What the command line hands over: a number, or the name of an enumeration's value.
    using Given = std::conditional_t<kIsPerKind<T>, double,
                                     std::conditional_t<std::is_enum_v<T>, std::string, T>>;
    const auto take = [this, field](const Given& value) {
      given[field.name] = [field, value](KVConfig& config) {
        if constexpr (std::is_enum_v<T>) {
          parse_kv_value(value, config.*field.member);
        } else {
          set_kv_field<T>(config, field, value);
        }
      };
    };
    command.add_option_function<Given>(field.option, take, field.help)->group(kCacheGroup);
  });
  command
      .add_option("--profile", profile,
                  "KV transform: a file, hadamard, auto (calibrated once and kept), model (the "
                  "folder's own) or none")
      ->group(kCacheGroup);
}

KVConfig CacheFlags::validate() const {
  KVConfig config = find_kv_preset(preset).config;
  for_each_kv_field([&](const auto& field) {  // in this order: sparsity, then that of keys
    if (const auto set = given.find(field.name); set != given.end()) set->second(config);
  });
  config.validate();
  return config;
}

std::string CacheFlags::profile_name() const {
  return profile.value_or(find_kv_preset(preset).profile);
}

KVConfig CacheFlags::resolve(const Model& model) const {
  KVConfig config = validate();
  config.profile = resolve_profile(profile_name(), model, config.budgeted());
  return config;
}

std::shared_ptr<const Profile> resolve_profile(const std::string& name, const Model& model,
                                               bool costs) {
  Progress bar("calibrating");
  ProfileHooks hooks;
  hooks.progress = [&bar](int64_t done, int64_t total) {
    throw_if_interrupted();
    bar.update(done, total);
  };
  hooks.note = hooks.warning = [&bar](const std::string& line) {
    bar.clear();
    std::fprintf(stderr, "mustafar: %s\n", line.c_str());
  };
  return Profile::resolve(name, model, hooks, costs);
}

void SamplingFlags::add_to(CLI::App& command) {
  const auto option = [&command](const char* name, auto& value, const char* help) {
    command.add_option(name, value, help)->capture_default_str()->group(kSamplingGroup);
  };
  option("-n,--n-predict", n_predict, "Tokens to generate at most; -1: until the context is full");
  option("-s,--seed", seed, "Same seed, same text; -1: a new one every time");
  // Where these are not given, generation_config.json decides; the help says what else.
  const SamplingParams usual = SamplingParams().with_defaults();
  const auto model_option = [&command](const char* name, auto& value, const auto& otherwise,
                                       const char* help) {
    std::string number = std::to_string(*otherwise);
    if (number.find('.') != std::string::npos) number.erase(number.find_last_not_of("0") + 1);
    if (number.back() == '.') number.pop_back();
    command.add_option(name, value, help)
        ->default_str("the model's, or " + number)
        ->group(kSamplingGroup);
  };
  model_option("--temp", params.temperature, usual.temperature,
               "Temperature; 0: always the most probable token");
  model_option("--top-k", params.top_k, usual.top_k, "Choose among the k most probable; 0: all");
  model_option("--top-p", params.top_p, usual.top_p,
               "... and the fewest with this probability together; 1: all");
  model_option("--min-p", params.min_p, usual.min_p,
               "... and those this probable relative to the best; 0: all");
  model_option("--repeat-penalty", params.repetition_penalty, usual.repetition_penalty,
               "For tokens of the newest text; 1: none");
  model_option("--repeat-last-n", params.penalty_window, usual.penalty_window,
               "What --repeat-penalty looks at; -1: everything");
  model_option("--presence-penalty", params.presence_penalty, usual.presence_penalty,
               "For tokens generated before");
  model_option("--frequency-penalty", params.frequency_penalty, usual.frequency_penalty,
               "... per time");
  option("--min-tokens", params.min_new_tokens, "No end of sequence before so many tokens");
  command.add_option("--logit-bias", logit_bias, "ID+BIAS or ID-BIAS, repeatable")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->allow_extra_args(false)
      ->group(kSamplingGroup);
  command.add_option("-r,--stop", params.stop, "Text that ends the output, repeatable")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->allow_extra_args(false)
      ->group(kSamplingGroup);
  command.add_flag("--ignore-eos", params.ignore_eos, "Go on past the model's end of sequence")
      ->group(kSamplingGroup);
}

SamplingParams SamplingFlags::resolve() const {
  SamplingParams resolved = params;
  if (n_predict < -1 || n_predict > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument(
        "-n must be -1 (until the context is full) or a count of tokens, not " +
        std::to_string(n_predict));
  }
  if (seed < -1) {
    throw std::invalid_argument("-s must be -1 (a new one every time) or a seed, not " +
                                std::to_string(seed));
  }
  resolved.max_new_tokens =
      n_predict == -1 ? std::numeric_limits<int32_t>::max() : static_cast<int32_t>(n_predict);
  if (seed >= 0) resolved.seed = static_cast<uint64_t>(seed);
  for (const std::string& text : logit_bias) resolved.logit_bias.push_back(parse_bias(text));
  return resolved;
}

void PromptFlags::add_to(CLI::App& command) {
  CLI::Option* from_text = command.add_option("-p,--prompt", text, "The prompt");
  command.add_option("-f,--file", file, "File that holds the prompt; -: standard input")
      ->excludes(from_text);
  command.add_flag("-e,--escape", escape, "Read \\n, \\t, \\\\ in -p as in C");
  command.add_flag("--special", special,
                   "Special tokens that the prompt spells are tokens, not text");
}

std::string PromptFlags::read() const {
  if (text) return escape ? unescape(*text) : *text;
  if (!file && isatty(STDIN_FILENO) == 1) {
    throw std::invalid_argument("no prompt: give -p TEXT, -f FILE, or pipe it in");
  }
  std::string prompt = read_text(file.value_or("-"));
  if (!prompt.empty() && prompt.back() == '\n') prompt.pop_back();  // the one that editors add
  return prompt;
}

std::string read_text(const std::string& path) {
  const bool is_stdin = path == "-";
  std::error_code ignored;
  if (!is_stdin && std::filesystem::is_directory(path, ignored)) {
    throw Error("cannot read " + path + ": it is a folder");
  }
  std::FILE* file = is_stdin ? stdin : std::fopen(path.c_str(), "rb");
  if (file == nullptr) throw Error("cannot read " + path + ": " + std::strerror(errno));
  std::string text;
  char buffer[1 << 16];
  size_t n;
  while ((n = std::fread(buffer, 1, sizeof(buffer), file)) > 0) text.append(buffer, n);
  const bool failed = std::ferror(file) != 0;
  const int error = errno;
  if (!is_stdin) std::fclose(file);
  if (failed) throw Error("cannot read " + path + ": " + std::strerror(error));
  return text;
}

}  // namespace mustafar::cli
