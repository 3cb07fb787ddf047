// A tokenizer.json, used on texts of every kind where it is accepted.
#include "fuzz_input.h"
#include "mustafar/error.h"
#include "mustafar/tokenizer.h"

using namespace mustafar;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::expect_only<TokenizerError>([&] {
    const Tokenizer tokenizer =
        Tokenizer::load(fuzz::write("tokenizer.json", fuzz::text(data, size)));
    for (const char* text : {"", "Hello, World  12\n\n x", "a\xff\xf0\x9f", "<|start|>é日本😀",
                             "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}) {
      std::vector<int32_t> ids;
      fuzz::expect_only<TokenizerError>([&] { ids = tokenizer.encode(text, true, true); });
      for (const int32_t id : ids) {
        if (id < 0 || id >= tokenizer.vocab_size()) std::abort();
      }
      const std::string whole = tokenizer.decode(ids);
      Tokenizer::Stream stream(tokenizer, /*skip_special=*/false);
      std::string pieces;
      for (const int32_t id : ids) pieces += stream.push(id);
      if (pieces + stream.flush() != whole) std::abort();
    }
  });
  return 0;
}
