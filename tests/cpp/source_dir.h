// Where the tests look for files of the repository, and for shared/ beside it.
#pragma once

#include <cstdlib>
#include <filesystem>

namespace mustafar::testing {

// The environment's MUSTAFAR_SOURCE_DIR, for a program carried to another machine; else the folder
// that the program was built from.
inline std::filesystem::path source_dir() {
  const char* chosen = std::getenv("MUSTAFAR_SOURCE_DIR");
  return chosen != nullptr && *chosen != '\0' ? chosen : MUSTAFAR_SOURCE_DIR;
}

}  // namespace mustafar::testing
