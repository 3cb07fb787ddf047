// The sub-commands of `mustafar`, one file each. A new one is a function here and a line in
// main.cc.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>

namespace mustafar::cli {

// What the chosen sub-command does once the command line has been read; returns the exit code.
using Run = std::function<int()>;

void add_generate(CLI::App& app, Run& run);
void add_chat(CLI::App& app, Run& run);
void add_info(CLI::App& app, Run& run);
void add_bench(CLI::App& app, Run& run);
void add_perplexity(CLI::App& app, Run& run);
void add_eval(CLI::App& app, Run& run);
void add_calibrate(CLI::App& app, Run& run);
void add_quantize(CLI::App& app, Run& run);
void add_completion(CLI::App& app, Run& run);
// Names and help alone: what is below reads the options.
void add_serve(CLI::App& app, Run& run);
void add_bench_serve(CLI::App& app, Run& run);

// Become a part of the Python package, with the arguments behind the command. Return only by
// throwing Error.
int serve(int argc, char** argv);
int bench_serve(int argc, char** argv);

inline constexpr int kExitOk = 0;
inline constexpr int kExitError = 1;        // what failed is on stderr
inline constexpr int kExitUsage = 2;        // an option, or its value
inline constexpr int kExitInterrupt = 130;  // Ctrl-C

}  // namespace mustafar::cli
