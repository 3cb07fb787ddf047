#include "cli/python_module.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <vector>

#include "cli/demo_model.h"
#include "mustafar/error.h"

namespace mustafar::cli {
namespace {

namespace fs = std::filesystem;

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
std::string find_python(const std::string& command) {
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
  throw Error(command + " runs in Python, and the mustafar package is not found by " + tried +
              ": pip install 'mustafar[server]', or name another Python in MUSTAFAR_PYTHON");
}

}  // namespace

int run_python_module(const std::string& command, const std::string& module, int argc,
                      char** argv) {
  setenv("PYTHONSAFEPATH", "1", 1);  // nothing is imported from the folder it is called in
  const std::string python = find_python(command);
  std::vector<char*> arguments;
  for (const char* argument : {python.c_str(), "-m", module.c_str()}) {
    arguments.push_back(const_cast<char*>(argument));
  }
  arguments.insert(arguments.end(), argv, argv + argc);
  arguments.push_back(nullptr);
  execvp(python.c_str(), arguments.data());
  throw Error("cannot run " + python + ": " + std::strerror(errno));
}

}  // namespace mustafar::cli
