// `mustafar calibrate`: makes a KV profile for a model from texts.
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "mustafar/calibration.h"

namespace mustafar::cli {
namespace {

struct Options {
  ModelFlags model;
  std::vector<std::string> files;
  std::string output;
  CalibrationOptions calibration;
};

int calibrate(const Options& options) {
  if (options.files.empty() && options.calibration.kind != "hadamard") {
    throw std::invalid_argument("-f FILE is needed, but for --kind hadamard");
  }
  std::vector<Prompt> texts;
  for (const std::string& file : options.files) texts.emplace_back(read_text(file));

  const InterruptGuard guard;
  const Model model = options.model.load();
  Progress bar("calibrating");
  CalibrationOptions calibration = options.calibration;
  calibration.progress = [&bar](int64_t done, int64_t total) {
    throw_if_interrupted();
    bar.update(done, total);
  };
  const Profile profile = mustafar::calibrate(model, texts, calibration);
  bar.clear();
  profile.save(options.output);
  std::printf("%s: %s, hash %s\n", options.output.c_str(), profile.kind.c_str(),
              profile.hash().c_str());
  return kExitOk;
}

}  // namespace

void add_calibrate(CLI::App& app, Run& run) {
  const auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("calibrate", "Calibrate a KV transform on text and write it as a profile");
  options->model.add_to(*command);
  CalibrationOptions& calibration = options->calibration;
  command->add_option("-f,--file", options->files, "Text file, repeatable; -: standard input")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->allow_extra_args(false);
  command->add_option("-o,--output", options->output, "Profile to write")->required();
  command->add_option("--kind", calibration.kind, "hadamard, klt or balanced")
      ->check(CLI::IsMember({"hadamard", "klt", "balanced"}))
      ->capture_default_str();
  command->add_option("--balance", calibration.balance, "The metric's exponent, 0 to 1")
      ->capture_default_str();
  command
      ->add_option("--scale-power", calibration.scale_power,
                   "Scaling of dims by a power of their deviation, 0 to 1; for int4")
      ->capture_default_str();
  command->add_option("-n,--max-tokens", calibration.max_tokens, "Tokens to use at most; -1: all")
      ->capture_default_str();
  command
      ->add_option("--skip", calibration.skip_tokens,
                   "First tokens of every text to leave out (attention sinks)")
      ->capture_default_str();
  command
      ->add_option("-c,--context", calibration.context,
                   "Contexts that it is for, in tokens; 0: the model's own")
      ->capture_default_str();
  command->add_flag("--budget", calibration.budget,
                    "Also measure what errors in every layer cost: for --kv-bytes-per-token and "
                    "--max-kld");
  command->callback([options, &run] { run = [options] { return calibrate(*options); }; });
}

}  // namespace mustafar::cli
