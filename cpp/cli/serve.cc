// `mustafar serve`: hands over to the server, which is a part of the Python package.
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <system_error>
#include <vector>

#include "cli/commands.h"
#include "cli/demo_model.h"
#include "cli/options.h"
#include "mustafar/error.h"

namespace mustafar::cli {
namespace {

namespace fs = std::filesystem;

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
    {"--max-streams", "Streamed replies at once at most"},
    {"--timeout", "Seconds that a request may take; 0: no limit"},
    {"--grace", "Seconds that running requests get when the server is told to stop"},
};

// The folder that Python's path needs for the package beside this program; empty where there is
// none, or only sources without the native module.
fs::path package_parent() {
  std::error_code ignored;
  fs::path package;
  try {
    package = demo_model_folder().parent_path().parent_path();  // mustafar/models/demo
  } catch (const ModelError&) {
    return {};
  }
  for (const fs::directory_entry& entry : fs::directory_iterator(package, ignored)) {
    if (entry.path().filename().string().starts_with("_core.")) return package.parent_path();
  }
  return {};
}

// Runs a program with its output thrown away; its exit code, or -1 where it can't be run.
int quiet_status(const std::string& program, const std::vector<const char*>& arguments) {
  const pid_t child = fork();
  if (child == 0) {
    const int nowhere = open("/dev/null", O_RDWR);
    for (const int stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) dup2(nowhere, stream);
    std::vector<char*> argv = {const_cast<char*>(program.c_str())};
    for (const char* argument : arguments) argv.push_back(const_cast<char*>(argument));
    argv.push_back(nullptr);
    execvp(argv[0], argv.data());
    _exit(127);
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) < 0) return -1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

bool has_package(const std::string& python) {
  return quiet_status(python, {"-c", "import mustafar._core"}) == 0;
}

// A Python that finds the package: MUSTAFAR_PYTHON, the one this was installed with, or the first
// of the path. Where it finds none, the one beside this program is added to its path. Throws Error.
std::string find_python() {
  std::vector<std::string> candidates;
  if (const char* named = std::getenv("MUSTAFAR_PYTHON"); named != nullptr && *named != 0) {
    candidates.emplace_back(named);
  } else {
    std::error_code ignored;
    const fs::path folder = fs::read_symlink("/proc/self/exe", ignored).parent_path();
    for (const char* name : {"python3", "python"}) {
      if (fs::exists(folder / name, ignored)) candidates.push_back((folder / name).string());
    }
    candidates.emplace_back("python3");
  }
  for (const std::string& python : candidates) {
    if (has_package(python)) return python;
  }
  if (const fs::path parent = package_parent(); !parent.empty()) {
    const char* path = std::getenv("PYTHONPATH");
    const bool more = path != nullptr && *path != 0;
    setenv("PYTHONPATH", (parent.string() + (more ? ":" + std::string(path) : "")).c_str(), 1);
    for (const std::string& python : candidates) {
      if (has_package(python)) return python;
    }
  }
  std::string tried;
  for (const std::string& python : candidates) tried += (tried.empty() ? "" : ", ") + python;
  throw Error("serve runs in Python, and the mustafar package is not found by " + tried +
              ": pip install 'mustafar[server]', or name another Python in MUSTAFAR_PYTHON");
}

}  // namespace

int serve(int argc, char** argv) {
  setenv("PYTHONSAFEPATH", "1", 1);  // nothing is imported from the folder it is called in
  const std::string python = find_python();
  std::vector<char*> arguments;
  const std::array<const char*, 3> own = {python.c_str(), "-m", "mustafar.server"};
  for (const char* argument : own) arguments.push_back(const_cast<char*>(argument));
  arguments.insert(arguments.end(), argv, argv + argc);
  arguments.push_back(nullptr);
  execvp(python.c_str(), arguments.data());
  throw Error("cannot run " + python + ": " + std::strerror(errno));
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
