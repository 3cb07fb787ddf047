// `mustafar generate`: continues a text.
#include <cstdio>
#include <memory>
#include <optional>
#include <string>

#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/options.h"
#include "cli/report.h"
#include "cli/terminal.h"
#include "mustafar/error.h"
#include "mustafar/session.h"

namespace mustafar::cli {
namespace {

struct Options {
  ModelFlags model;
  CacheFlags cache;
  SamplingFlags sampling;
  PromptFlags prompt;
  int32_t context = 0;  // tokens; 0: the model's
  int32_t logprobs = -1;
  bool json = false;
  bool echo = false;
  bool quiet = false;
};

void write_out(const std::string& text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    throw Error("could not write the output");
  }
}

nlohmann::ordered_json logprobs_json(const std::vector<TokenLogprob>& logprobs) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const TokenLogprob& token : logprobs) {
    nlohmann::ordered_json top = nlohmann::ordered_json::array();
    for (const auto& [id, logprob] : token.top) top.push_back({id, logprob});
    list.push_back({{"token_id", token.token_id}, {"logprob", token.logprob}, {"top", top}});
  }
  return list;
}

int generate(const Options& options) {
  // Everything that can be wrong with the options is found before the model is read.
  options.cache.validate();
  SamplingParams params = options.sampling.resolve();
  params.logprobs = options.json ? options.logprobs : -1;
  if (options.context < 0) {
    throw std::invalid_argument("-c must be 0 (the model's context) or a count of tokens, not " +
                                std::to_string(options.context));
  }
  const std::string prompt = options.prompt.read();

  const InterruptGuard guard;
  const Model model = options.model.load();
  const KVConfig kv = options.cache.resolve(model);
  Session session(model, kv,
                  options.context > 0 ? std::optional<int32_t>(options.context) : std::nullopt);

  Progress bar("prompt");
  session.set_interrupt_check(throw_if_interrupted);
  session.set_prefill_progress([&bar](int64_t done, int64_t total) { bar.update(done, total); });
  Generation generation =
      session.start(prompt, params, PromptOptions{.parse_special = options.prompt.special});
  bar.clear();
  session.set_interrupt_check({});  // from here on Ctrl-C ends the output between two tokens

  if (options.echo && !options.json) write_out(prompt);
  std::string piece;
  while (!interrupted() && generation.step(piece)) {
    if (!options.json && !piece.empty()) write_out(piece);
  }
  const bool stopped = interrupted();
  generation.stop();

  const GenerateResult& result = generation.result();
  const MemoryUsage memory = session.memory();
  if (options.json) {
    nlohmann::ordered_json json = {{"text", result.text},
                                   {"token_ids", result.token_ids},
                                   {"finish_reason", name_of(result.finish_reason)},
                                   {"stats", to_json(result.stats)},
                                   {"kv", to_json(memory)},
                                   {"kv_config", to_json(kv)},
                                   {"model", model.folder().string()},
                                   {"device", model.device_description()}};
    if (params.logprobs >= 0) json["logprobs"] = logprobs_json(result.logprobs);
    write_out(dump(json) + "\n");
  } else {
    write_out("\n");
    if (!options.quiet) {
      std::fprintf(stderr, "\n%s\n", summary(result.stats, memory).c_str());
      if (result.finish_reason == FinishReason::kContext) {
        std::fprintf(stderr, "the text was cut: the context of %lld tokens is full (-c)\n",
                     static_cast<long long>(session.max_tokens()));
      }
    }
  }
  return stopped ? kExitInterrupt : kExitOk;
}

}  // namespace

void add_generate(CLI::App& app, Run& run) {
  const auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("generate", "Continue a text");
  options->prompt.add_to(*command);
  options->model.add_to(*command);
  command->add_option("-c,--ctx-size", options->context, "Tokens of context; 0: the model's")
      ->capture_default_str();
  options->sampling.add_to(*command);
  options->cache.add_to(*command);
  command->add_flag("--echo", options->echo, "Print the prompt before its continuation");
  command->add_flag("-q,--quiet", options->quiet, "No summary on stderr");
  command->add_flag("--json", options->json, "One JSON object instead of text");
  command
      ->add_option("--logprobs", options->logprobs,
                   "With --json: log-probabilities and this many alternatives; -1: none")
      ->capture_default_str();
  command->callback([options, &run] { run = [options] { return generate(*options); }; });
}

}  // namespace mustafar::cli
