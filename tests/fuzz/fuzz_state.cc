// A session's state file. Its checksums are put right first, as one who forges a file would, and so
// is the model's fingerprint: what is tried is everything behind them. A first byte of 'r' (raw)
// leaves the file as it is. A session that loads must be able to go on.
#include <cstring>
#include <nlohmann/json.hpp>

#include "core/hash.h"
#include "fuzz_input.h"
#include "mustafar/error.h"
#include "mustafar/session.h"
#include "runtime/model_impl.h"
#include "support/tiny_model.h"

using namespace mustafar;

namespace {

using Json = nlohmann::ordered_json;

const Model& model() {
  static const Model kModel = [] {
    mustafar::testing::write_tiny_model(fuzz::folder());
    ModelOptions options;
    options.threads = 1;
    return Model::load(fuzz::folder(), options);
  }();
  return kModel;
}

size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

// The file with right checksums and fingerprint, or as it is where its header can't be read.
std::string repaired(const std::string& file) {
  constexpr size_t kPreamble = 64;
  if (file.size() < kPreamble) return file;
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, file.data() + 16, 8);
  if (header_bytes > file.size() || kPreamble + padded(header_bytes) > file.size()) return file;
  Json header = Json::parse(file.substr(kPreamble, header_bytes), nullptr, false);
  if (!header.is_object() || !header.contains("sections") || !header["sections"].is_array()) {
    return file;
  }
  if (header.contains("model_fingerprint")) header["model_fingerprint"] = model().fingerprint();
  size_t at = kPreamble + padded(header_bytes);
  const std::string sections = file.substr(at);
  at = 0;
  for (Json& section : header["sections"]) {
    if (!section.is_object() || !section.contains("bytes") ||
        !section["bytes"].is_number_unsigned()) {
      break;
    }
    const uint64_t bytes = section["bytes"].get<uint64_t>();
    if (bytes > sections.size() || padded(bytes) > sections.size() - at) break;
    Hash64 hash;
    hash.add_words(sections.data() + at, padded(bytes));
    section["hash"] = hash.hex();
    at += padded(bytes);
  }
  std::string text = header.dump(-1, ' ', false, Json::error_handler_t::replace);
  header_bytes = text.size();
  text.resize(padded(text.size()), '\0');
  Hash64 hash;
  hash.add_words(text.data(), text.size());
  hash.add_int(static_cast<int64_t>(header_bytes));
  const uint64_t value = hash.value();
  std::string out = file.substr(0, kPreamble);
  std::memcpy(out.data() + 16, &header_bytes, 8);
  std::memcpy(out.data() + 24, &value, 8);
  return out + text + sections;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string file = fuzz::text(data + 1, size - 1);
  const auto path = fuzz::write("session.mstf", data[0] == 'r' ? file : repaired(file));
  const int64_t held = model().memory().kv_bytes;
  fuzz::expect_only<StateError>([&] {
    Session session = Session::load(model(), path);
    if (session.position() < session.max_tokens()) session.decode(65);
    session.rewind(session.position() / 2);
  });
  if (model().memory().kv_bytes != held) std::abort();
  return 0;
}
