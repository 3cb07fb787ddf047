// `mustafar bench-serve`: hands over to the client that measures servers, which is a part of the
// Python package.
#include <cstdint>
#include <string>

#include "cli/commands.h"
#include "cli/python_module.h"

namespace mustafar::cli {
namespace {

struct ClientOption {
  const char* names;
  const char* help;
  bool is_flag = false;
};

// What python -m mustafar.bench_serve knows. They are read there; here they are for shells that
// complete them.
constexpr ClientOption kClientOptions[] = {
    {"--url", "A server that runs; without: mustafar serve is started"},
    {"-m,--model", "The model to start mustafar serve with"},
    {"--model-name", "As requests name it"},
    {"--api-key", "Sent to the server; also MUSTAFAR_API_KEY"},
    {"--pid", "The server's process, whose memory is watched"},
    {"--rate", "Requests a second, at random times (Poisson)"},
    {"--clients", "Clients that wait for each reply, in place of --rate"},
    {"--requests", "Requests to send"},
    {"--warmup", "Requests sent before, alone"},
    {"--seed", "Of all that is random"},
    {"--prompt-tokens", "Mean of prompts"},
    {"--prompt-sigma", "Of the logarithm of their length; 0: all are alike"},
    {"--output-tokens", "Mean of replies"},
    {"--output-sigma", "Of the logarithm of their length; 0: all are alike"},
    {"--lengths", "A file with lengths, lines of JSON"},
    {"--context", "Tokens of a prompt and its reply at most"},
    {"--text", "A text that prompts are cut from"},
    {"--shared-prefix", "Tokens that all prompts begin with"},
    {"--tokenizer", "A model folder that counts tokens"},
    {"--chat", "Conversations, not texts", true},
    {"--extra", "More fields of every request, as JSON"},
    {"--timeout", "Seconds that a request may take"},
    {"--json", "Print JSON", true},
    {"--version", "Print the version of the Python package and exit", true},
};

}  // namespace

int bench_serve(int argc, char** argv) {
  return run_python_module("bench-serve", "mustafar.bench_serve", argc, argv);
}

void add_bench_serve(CLI::App& app, Run& /*run*/) {
  CLI::App* command =
      app.add_subcommand("bench-serve", "Send load to a server and measure its replies");
  for (const ClientOption& option : kClientOptions) {
    if (option.is_flag) {
      command->add_flag_function(option.names, [](int64_t) {}, option.help);
    } else {
      command->add_option_function<std::string>(
          option.names, [](const std::string&) {}, option.help);
    }
  }
}

}  // namespace mustafar::cli
