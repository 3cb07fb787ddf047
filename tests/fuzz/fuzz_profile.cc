// A KV profile, a safetensors file with metadata.
#include "fuzz_input.h"
#include "mustafar/error.h"
#include "mustafar/profile.h"

using namespace mustafar;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::expect_only<ModelError>([&] {
    const auto profile =
        Profile::load(fuzz::write("kv_profile.safetensors", fuzz::text(data, size)));
    ModelConfig config;
    config.n_layers = 1;
    config.n_kv_heads = 1;
    config.head_dim = 2;
    profile->check(config, "0123456789abcdef");
    if (profile->hash().size() != 16 || profile->k_forward.size() != 4) std::abort();
  });
  return 0;
}
