// Writes a safetensors file whose tensors are known before their bytes are: the header comes
// first, then tensors in any order, each to its place.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace mustafar {

// A tensor of a file to be written.
struct DeclaredTensor {
  std::string name;
  std::string dtype;           // as the format spells it: "I32", "BF16", ...
  std::vector<int64_t> shape;  // outermost first
  int64_t bytes = 0;
};

class SafetensorsWriter {
 public:
  // Creates the file, which must not be there, and writes its header. In the file tensors of
  // larger elements come first, so that all are aligned. Throws Error naming path and reason, as
  // the other calls do.
  SafetensorsWriter(std::filesystem::path path, std::vector<DeclaredTensor> tensors);
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  // The whole of a declared tensor, once. data: of the declared bytes.
  void write(const std::string& name, const void* data);
  // Flushes the file to disk. Every tensor has been written.
  void finish();

 private:
  struct Place {
    int64_t at = 0, bytes = 0;
    bool written = false;
  };

  void write_at(int64_t at, const void* data, int64_t bytes);
  [[noreturn]] void fail(const char* what) const;

  std::filesystem::path path_;
  std::map<std::string, Place> places_;
  int fd_ = -1;
};

}  // namespace mustafar
