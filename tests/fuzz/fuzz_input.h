// What the fuzz entries share: inputs as files, and a stop for errors that are not the promised
// ones.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <string>

#include "support/model_folder.h"

namespace mustafar::fuzz {

// The process's own folder, gone with it.
inline const std::filesystem::path& folder() {
  static const testing::TemporaryFolder kFolder;
  return kFolder.path();
}

inline std::filesystem::path write(const char* name, const std::string& bytes) {
  const std::filesystem::path path = folder() / name;
  std::ofstream(path, std::ios::binary) << bytes;
  return path;
}

inline std::string text(const uint8_t* data, size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

// Runs something that may throw Expected and nothing else.
template <typename Expected, typename Run>
void expect_only(Run&& run) {
  try {
    run();
  } catch (const Expected&) {
  } catch (const std::exception& error) {
    std::fprintf(stderr, "an error of another type: %s\n", error.what());
    std::abort();
  }
}

}  // namespace mustafar::fuzz
