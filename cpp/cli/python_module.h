// Commands that are a part of the Python package: this program becomes a Python that runs them.
#pragma once

#include <string>

namespace mustafar::cli {

// Runs a module with arguments ([argc]) in a Python that finds the package. Returns only by
// throwing Error, which names the command.
int run_python_module(const std::string& command, const std::string& module, int argc, char** argv);

}  // namespace mustafar::cli
