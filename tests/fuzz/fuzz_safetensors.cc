// A safetensors file: header and data.
#include "fuzz_input.h"
#include "io/safetensors.h"
#include "mustafar/error.h"

using namespace mustafar;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::expect_only<ModelError>([&] {
    const SafetensorsFile file =
        SafetensorsFile::open(fuzz::write("model.safetensors", fuzz::text(data, size)));
    for (const SafetensorsEntry& entry : file.entries) {
      if (entry.begin > entry.end || entry.end > file.file.bytes()) std::abort();
    }
  });
  return 0;
}
