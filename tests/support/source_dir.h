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

// Where the trained checkpoints of the tests lie, a folder each: the environment's
// MUSTAFAR_TEST_MODELS, else shared/data/models beside the repository.
inline std::filesystem::path test_models() {
  const char* chosen = std::getenv("MUSTAFAR_TEST_MODELS");
  if (chosen != nullptr && *chosen != '\0') return chosen;
  return source_dir() / "../shared/data/models";
}

}  // namespace mustafar::testing
