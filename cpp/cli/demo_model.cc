#include "cli/demo_model.h"

#include <cstdlib>
#include <string>
#include <system_error>
#include <vector>

#include "mustafar/error.h"

namespace mustafar::cli {
namespace {

namespace fs = std::filesystem;

std::vector<fs::path> candidates(const fs::path& program_folder) {
  const fs::path in_package = fs::path("mustafar") / "models" / "demo";
  std::vector<fs::path> folders;
  folders.push_back(program_folder.parent_path() / "models" / "demo");  // mustafar/bin/ in a wheel
  folders.push_back(program_folder.parent_path() / "share" / in_package);
  folders.push_back(program_folder.parent_path() / in_package);  // pip install --target
  std::error_code ignored;                    // a folder that can't be read has no candidates
  for (const char* lib : {"lib", "lib64"}) {  // beside a wheel's script folder
    for (const fs::directory_entry& entry :
         fs::directory_iterator(program_folder.parent_path() / lib, ignored)) {
      if (entry.path().filename().string().rfind("python", 0) != 0) continue;
      for (const char* packages : {"site-packages", "dist-packages"}) {  // the latter is Debian's
        folders.push_back(entry.path() / packages / in_package);
      }
    }
  }
  fs::path parent = program_folder;  // build/<preset>/cpp/ in the source tree
  for (int levels = 0; levels < 4 && parent.has_relative_path(); levels++) {
    folders.push_back(parent / "python" / in_package);
    parent = parent.parent_path();
  }
  return folders;
}

}  // namespace

fs::path demo_model_folder() {
  if (const char* folder = std::getenv("MUSTAFAR_DEMO_MODEL"); folder != nullptr && *folder != 0) {
    return folder;
  }
  std::error_code ignored;
  const fs::path program = fs::read_symlink("/proc/self/exe", ignored);
  for (const fs::path& folder : candidates(program.parent_path())) {
    if (fs::exists(folder / "config.json", ignored)) return folder;
  }
  throw ModelError("the demo model is not installed beside " + program.string() +
                   ": give a model folder with -m, or its place in MUSTAFAR_DEMO_MODEL");
}

}  // namespace mustafar::cli
