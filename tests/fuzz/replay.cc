// Runs a fuzz entry without libFuzzer: every file of a corpus, then seeded mutations of them, for
// compilers that have no fuzzer of their own. An input that fails is written to a file first.
//
//     replay_NAME CORPUS_FOLDER [MUTATIONS] [SEED]
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

// Changes a byte or a bit, takes out or doubles a piece, cuts the end off, or brings a piece of
// another input in.
void mutate(std::string* input, const std::vector<std::string>& corpus, std::mt19937_64& random) {
  static const std::string kInteresting("\0\x01\x7f\x80\xff{}[]\",:0-9e.%|()\\\n", 24);
  const auto below = [&](size_t n) { return n == 0 ? 0 : random() % n; };
  const size_t at = below(input->size()), n = 1 + below(std::min<size_t>(16, input->size()));
  switch (random() % 7) {
    case 0:
      if (!input->empty()) (*input)[at] = static_cast<char>(random());
      break;
    case 1:
      if (!input->empty()) (*input)[at] = static_cast<char>((*input)[at] ^ 1 << random() % 8);
      break;
    case 2:
      if (!input->empty()) (*input)[at] = kInteresting[below(kInteresting.size())];
      break;
    case 3:
      input->erase(at, n);
      break;
    case 4:
      input->insert(at, input->substr(at, n));
      break;
    case 5:
      input->resize(at);
      break;
    default: {
      const std::string& other = corpus[below(corpus.size())];
      input->insert(at, other.substr(below(other.size()), 1 + below(64)));
    }
  }
}

void run(const std::string& input) {
  // Kept where a crash can be looked into; a sanitizer ends the process.
  static const char* const kept = std::getenv("MUSTAFAR_FUZZ_INPUT");
  if (kept) std::ofstream(kept, std::ios::binary) << input;
  // A copy of exactly its size, so that reading past it is seen.
  const std::vector<uint8_t> bytes(input.begin(), input.end());
  LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s CORPUS_FOLDER [MUTATIONS] [SEED]\n", argv[0]);
    return 2;
  }
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(argv[1])) files.push_back(entry);
  std::sort(files.begin(), files.end());
  std::vector<std::string> corpus;
  for (const auto& file : files) {
    std::ifstream in(file, std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
    run(corpus.back());
  }
  if (corpus.empty()) {
    std::fprintf(stderr, "%s: no inputs\n", argv[1]);
    return 1;
  }
  const long mutations = argc > 2 ? std::atol(argv[2]) : 1000;
  std::mt19937_64 random(argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 1);
  for (long i = 0; i < mutations; i++) {
    std::string input = corpus[random() % corpus.size()];
    for (uint64_t n = 1 + random() % 4; n > 0; n--) mutate(&input, corpus, random);
    run(input);
  }
  std::printf("%zu inputs and %ld mutations\n", corpus.size(), mutations);
  return 0;
}
