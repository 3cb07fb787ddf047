// Continues a text with a model: continue_text MODEL_FOLDER TEXT [auto|cpu|cuda]
#include <mustafar/model.h>
#include <mustafar/session.h>

#include <exception>
#include <iostream>
#include <string_view>

int main(int argc, char** argv) try {
  if (argc != 3 && argc != 4) {
    std::cerr << "usage: continue_text MODEL_FOLDER TEXT [auto|cpu|cuda]\n";
    return 2;
  }
  mustafar::ModelOptions options;
  if (argc == 4) options.device = argv[3];
  const mustafar::Model model = mustafar::Model::load(argv[1], options);

  mustafar::Session session(model, mustafar::KVConfig::preset("lossless", model));

  mustafar::SamplingParams params;
  params.max_new_tokens = 64;
  params.temperature = 0;  // greedy
  std::cout << argv[2];
  session.generate(argv[2], params, [](std::string_view piece) {
    std::cout << piece << std::flush;
    return true;  // false would stop
  });

  const mustafar::MemoryUsage memory = session.memory();
  std::cout << "\n"
            << session.position() << " tokens, KV cache " << memory.used
            << " bytes, dense it would be " << memory.dense_equivalent << "\n";
  return 0;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 1;
}
