// `mustafar serve`: hands over to the server, which is a part of the Python package.
#include <cstdint>
#include <memory>
#include <string>

#include "cli/commands.h"
#include "cli/options.h"
#include "cli/python_module.h"

namespace mustafar::cli {
namespace {

struct ServerOption {
  const char* names;
  const char* help;
};

// What python -m mustafar.server knows beside the options of the model and the cache. They are read
// there; here they are for shells that complete them.
constexpr ServerOption kServerOptions[] = {
    {"-c,--ctx-size", "Tokens of prompt and reply at most; 0: the model's context"},
    {"-n,--n-predict", "Tokens of a chat reply where a request doesn't say; -1: until the context"},
    {"--chat-template", "In place of the model's own"},
    {"--prefix-cache", "Beginnings of prompts computed once: exact, approximate or off"},
    {"--system-prefix", "What comes before the user's first message is computed once"},
    {"--prefix-bytes", "Bytes kept for prompts to come; 0: up to --kv-budget, or 1G"},
    {"--on-pressure", "What gives way where --kv-budget is used up: pause or sparser"},
    {"--swap-bytes", "Bytes beside --kv-budget where paused requests keep their caches"},
    {"--host", "Address to listen at"},
    {"--port", "Port to listen at; 0: one that is free"},
    {"--model-name", "What the model is called in requests"},
    {"--api-key", "A key that clients must send; also MUSTAFAR_API_KEY"},
    {"--allow-host", "A name by which browsers may reach a server on loopback"},
    {"--max-batch", "Sequences that decode together at most"},
    {"--max-waiting", "Requests that wait at most"},
    {"--prefill-tokens", "Tokens of prompts between two decode steps at most"},
    {"--max-body", "Bytes of a request's body at most"},
    {"--max-prompt", "Tokens of a prompt at most; 0: the context"},
    {"--max-choices", "Choices of a request at most"},
    {"--max-grammar", "Bytes of a JSON schema or grammar that replies follow at most"},
    {"--max-streams", "Streamed replies at once at most"},
    {"--timeout", "Seconds that a request may take; 0: no limit"},
    {"--grace", "Seconds that running requests get when the server is told to stop"},
};

}  // namespace

int serve(int argc, char** argv) {
  return run_python_module("serve", "mustafar.server", argc, argv);
}

void add_serve(CLI::App& app, Run& /*run*/) {
  struct Flags {
    ModelFlags model;
    CacheFlags cache;
  };
  const auto flags = std::make_shared<Flags>();
  CLI::App* command =
      app.add_subcommand("serve", "Serve a model over HTTP, as OpenAI's clients talk to one");
  flags->model.add_to(*command);
  flags->cache.add_to(*command);
  for (const ServerOption& option : kServerOptions) {
    command->add_option_function<std::string>(option.names, [](const std::string&) {}, option.help);
  }
  command->add_flag_function(
      "--version", [](int64_t) {}, "Print the version of the Python package and exit");
  command->callback([flags] {});  // lives as long as the command that points into it
}

}  // namespace mustafar::cli
