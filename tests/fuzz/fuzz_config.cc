// A model folder's config.json; after a zero byte, its generation_config.json.
#include "fuzz_input.h"
#include "io/model_config.h"
#include "mustafar/error.h"

using namespace mustafar;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string input = fuzz::text(data, size);
  const size_t split = input.find('\0');
  fuzz::write("config.json", input.substr(0, split));
  if (split == std::string::npos) {
    std::filesystem::remove(fuzz::folder() / "generation_config.json");
  } else {
    fuzz::write("generation_config.json", input.substr(split + 1));
  }
  fuzz::expect_only<ModelError>([&] {
    const ModelConfig config = read_model_config(fuzz::folder());
    if (config.n_heads < 1 || config.n_kv_heads < 1 || config.n_heads % config.n_kv_heads != 0 ||
        config.head_dim < 1 || config.vocab_size < 1 || !(config.rope_theta > 0)) {
      std::abort();  // nothing that a model could be built from
    }
  });
  return 0;
}
