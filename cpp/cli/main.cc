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
#include "cli/options.h"
#include "mustafar/error.h"
#include "mustafar/version.h"

namespace mustafar::cli {
namespace {

constexpr void (*kCommands[])(CLI::App&, Run&) = {
    add_generate,  add_chat,     add_info,  add_bench,       add_perplexity, add_eval,
    add_calibrate, add_quantize, add_serve, add_bench_serve, add_completion};

constexpr const char* kExamples =
    "Examples:\n"
    "  mustafar chat                                talk with the small demo model\n"
    "  mustafar generate -m FOLDER -p \"Once upon\"   continue a text with a model of yours\n"
    "  mustafar chat -m FOLDER -f question.txt --json > answer.json\n";

int fail(const std::string& what, int code) {
  std::fflush(stdout);
  std::fprintf(stderr, "mustafar: %s\n", with_option_names(what).c_str());
  return code;
}

// What is wrong with a first argument that should be a command; empty where it is one.
std::string no_command(const CLI::App& app, const std::string& name) {
  std::string known;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
    if (command->get_name() == name) return "";
    known += (known.empty() ? "" : ", ") + command->get_name();
  }
  return "no command '" + name + "'; there are " + known +
         "; \"mustafar --help\" says what they do";
}

int run_command(int argc, char** argv) {
  CLI::App app("A Llama runtime with a bitmap-sparse KV cache.", "mustafar");
  app.set_version_flag("--version", MUSTAFAR_VERSION);
  app.require_subcommand(1);
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  Run run;
  for (const auto& add : kCommands) add(app, run);
  app.footer(kExamples);
  if (argc > 1 && argv[1][0] != '-') {
    const std::string wrong = no_command(app, argv[1]);
    if (!wrong.empty()) return fail(wrong, kExitUsage);
  }

  try {
    const std::string name = argc > 1 ? argv[1] : "";
    if (name == "serve") return serve(argc - 2, argv + 2);
    if (name == "bench-serve") return bench_serve(argc - 2, argv + 2);
  } catch (const Error& error) {
    return fail(error.what(), kExitError);
  }

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
