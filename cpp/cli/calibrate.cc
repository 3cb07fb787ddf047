// `mustafar calibrate`: statistics are gathered natively, the eigenproblems are numpy's, so this
// hands over to the Python package that the command was installed with.
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "mustafar/error.h"

namespace mustafar::cli {
namespace {

// The interpreter beside this executable (a virtual environment's bin folder), else the path's.
std::string python() {
  std::error_code error;
  const auto self = std::filesystem::read_symlink("/proc/self/exe", error);
  if (!error) {
    const auto beside = self.parent_path() / "python3";
    if (::access(beside.c_str(), X_OK) == 0) return beside.string();
  }
  return "python3";
}

int calibrate(const std::vector<std::string>& arguments) {
  const std::string interpreter = python();
  const std::string script =
      "import sys\n"
      "try:\n"
      "    from mustafar.calibration import main\n"
      "except ImportError as e:\n"
      "    sys.exit(f'mustafar: calibrate needs the mustafar Python package: {e}')\n"
      "sys.exit(main(sys.argv[1:]))\n";
  std::vector<std::string> words = {interpreter, "-c", script};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  ::execvp(interpreter.c_str(), argv.data());
  throw Error("calibrate needs python3 with the mustafar package, but " + interpreter +
              " cannot be run: " + std::strerror(errno));
}

}  // namespace

void add_calibrate(CLI::App& app, Run& run) {
  CLI::App* command = app.add_subcommand(
      "calibrate", "Calibrate a KV transform on text: -m DIR -f TEXT -o PROFILE (-h for all)");
  command->prefix_command();
  command->set_help_flag();
  command->callback([command, &run] {
    run = [arguments = command->remaining()] { return calibrate(arguments); };
  });
}

}  // namespace mustafar::cli
