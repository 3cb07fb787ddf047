// `mustafar`: reads the command line, runs one sub-command, turns exceptions into exit codes.
#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/interrupt.h"
#include "mustafar/error.h"
#include "mustafar/version.h"

namespace mustafar::cli {
namespace {

constexpr void (*kCommands[])(CLI::App&, Run&) = {add_generate,   add_chat, add_info,     add_bench,
                                                  add_perplexity, add_eval, add_calibrate};

int fail(const char* what, int code) {
  std::fflush(stdout);
  std::fprintf(stderr, "mustafar: %s\n", what);
  return code;
}

int run_command(int argc, char** argv) {
  CLI::App app("A Llama runtime with a bitmap-sparse KV cache.", "mustafar");
  app.set_version_flag("--version", MUSTAFAR_VERSION);
  app.require_subcommand(1);
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  Run run;
  for (const auto& add : kCommands) add(app, run);

  // Options with one dash and several letters, as llama.cpp has them.
  std::vector<std::string> arguments;
  for (int i = argc - 1; i > 0; i--) {  // the parser takes them from the back
    const std::string argument = argv[i];
    arguments.push_back(argument == "-pg" ? "--pg" : argument);
  }
  try {
    app.parse(arguments);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? kExitOk : kExitUsage;
  }
  try {
    const int code = run();
    if (std::fflush(stdout) != 0) return fail("could not write the output", kExitError);
    return code;
  } catch (const Cancelled&) {
    return fail("interrupted", kExitInterrupt);
  } catch (const std::invalid_argument& error) {
    return fail(error.what(), kExitUsage);
  } catch (const std::bad_alloc&) {
    return fail("out of memory", kExitError);
  } catch (const std::exception& error) {
    return fail(error.what(), kExitError);
  }
}

}  // namespace
}  // namespace mustafar::cli

int main(int argc, char** argv) {
  std::signal(SIGPIPE, SIG_IGN);  // a closed pipe is a failed write, which is reported
  try {
    return mustafar::cli::run_command(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "mustafar: %s\n", error.what());
    return mustafar::cli::kExitError;
  }
}
