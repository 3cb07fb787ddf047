// `mustafar quantize`: writes a model with weights of 8 or 4 bits as a folder.
#include "mustafar/quantize.h"

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/demo_model.h"
#include "cli/interrupt.h"
#include "cli/options.h"
#include "cli/terminal.h"

namespace mustafar::cli {
namespace {

struct Options {
  std::string model;
  std::string output;
  std::vector<std::string> files;
  QuantizeOptions quantize;
};

int quantize(const Options& options) {
  std::vector<Prompt> texts;
  for (const std::string& file : options.files) texts.emplace_back(read_text(file));
  const InterruptGuard guard;
  Progress bar("quantising");
  QuantizeOptions given = options.quantize;
  given.progress = [&bar](int64_t done, int64_t total) {
    throw_if_interrupted();
    bar.update(done, total);
  };
  const std::filesystem::path model =
      options.model.empty() ? demo_model_folder() : std::filesystem::path(options.model);
  const QuantizeResult result = mustafar::quantize(model, options.output, texts, given);
  bar.clear();
  std::printf("%s: %lld matrices of %d bits, %s instead of %s\n", options.output.c_str(),
              static_cast<long long>(result.matrices), given.bits,
              format_bytes(static_cast<double>(result.bytes)).c_str(),
              format_bytes(static_cast<double>(result.stored_bytes)).c_str());
  return kExitOk;
}

}  // namespace

void add_quantize(CLI::App& app, Run& run) {
  const auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand(
      "quantize", "Write a model with weights of 8 or 4 bits as a folder (compressed-tensors)");
  QuantizeOptions& quantize_options = options->quantize;
  command->add_option(
      "-m,--model", options->model,
      "Model folder, or ORGANISATION/NAME of a model in the Hugging Face cache; without: the "
      "small demo model");
  command->add_option("-o,--output", options->output, "Folder to write, not there or empty")
      ->required();
  command
      ->add_option("-f,--file", options->files,
                   "Text to calibrate on, repeatable; -: standard input. Without: every weight is "
                   "rounded by itself")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->allow_extra_args(false);
  command
      ->add_option("-n,--max-tokens", quantize_options.max_tokens,
                   "Tokens of text to use at most; -1: all")
      ->check(CLI::Range(int64_t{-1}, int64_t{1} << 40))
      ->capture_default_str();
  command->add_option("--bits", quantize_options.bits, "Bits of a weight: 4 or 8")
      ->check(CLI::IsMember({4, 8}))
      ->capture_default_str();
  command->add_option("--group", quantize_options.group, "Inputs that share a scale: 32, 64 or 128")
      ->check(CLI::IsMember({32, 64, 128}))
      ->capture_default_str();
  command->add_flag("--symmetric", quantize_options.symmetric,
                    "No zero points: fewer bytes, larger errors");
  command
      ->add_option("-t,--threads", quantize_options.threads,
                   "CPU threads; 0: what cores and CPU quota allow")
      ->capture_default_str();
  command->callback([options, &run] { run = [options] { return quantize(*options); }; });
}

}  // namespace mustafar::cli
