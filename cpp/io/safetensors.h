// The safetensors format: 8 bytes header length (little-endian), a JSON header that names every
// tensor with its dtype, shape and byte range, then the tensors' bytes without gaps to the end.
//
// Everything is checked before any tensor is handed out. Files are accepted as the reference
// implementation accepts them, but for these, which it lets pass and we refuse:
//   - two tensors of the same name;
//   - a header that does not begin with '{' (the format's own rule);
//   - a tensor described by a list instead of an object, or a dtype by an object;
//   - more than 64 dimensions.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "io/mapped_file.h"

namespace mustafar {

constexpr uint64_t kSafetensorsHeaderCap = 100'000'000;  // bytes
constexpr size_t kSafetensorsMaxRank = 64;

struct SafetensorsEntry {
  std::string name;
  const char* dtype = "";       // as the format spells it: "F32", "BF16", "I64", ...
  std::vector<uint64_t> shape;  // outermost first; empty: a scalar
  uint64_t begin = 0;           // bytes from the start of the file
  uint64_t end = 0;
};

struct SafetensorsFile {
  MappedFile file;
  std::vector<SafetensorsEntry> entries;  // in the order of their bytes

  // Throws ModelError naming the file, the tensor, the field and the header offset.
  static SafetensorsFile open(const std::filesystem::path& path);
};

}  // namespace mustafar
