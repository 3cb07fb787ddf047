// Sessions on disk. Little-endian:
//
//     magic "MSTFKV\r\n"
//     uint32 version
//     uint32 0x01020304, as a check of the order of bytes
//     uint64 header_bytes
//     uint64 header_hash
//     header: JSON, zero-padded to a multiple of 64 bytes; hashed with the padding
//     sections in the header's order, each zero-padded to a multiple of 64 bytes, hashed likewise:
//       tokens   int32 [n_tokens]
//       logits   f32 [vocab], absent after a rewind
//       dense    sinks and tail, SequenceCache::download_dense()
//       queries  query magnitudes, where a policy keeps them
//       pages    the compressed blocks, oldest first, without the first "dropped_blocks" of the
//                header (absent: 0), which no layer's sliding window reaches any more
//
// Nothing is taken from a file before its hash has been checked, and masks are checked against the
// layout, so that a damaged or foreign file can't lead a kernel astray.
#include <bit>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "core/atomic_file.h"
#include "core/hash.h"
#include "core/json_tree.h"
#include "format/check_slot.h"
#include "io/mapped_file.h"
#include "mustafar/error.h"
#include "mustafar/profile.h"
#include "mustafar/session.h"
#include "runtime/kv_fields.h"
#include "runtime/session_impl.h"

namespace mustafar {
namespace {

static_assert(std::endian::native == std::endian::little, "state files are written as in memory");

constexpr char kMagic[8] = {'M', 'S', 'T', 'F', 'K', 'V', '\r', '\n'};
constexpr uint32_t kByteOrder = 0x01020304;
constexpr int64_t kAlignment = 64;
constexpr uint64_t kMaxHeaderBytes = 1 << 20;

struct Preamble {
  char magic[8];
  uint32_t version;
  uint32_t byte_order;
  uint64_t header_bytes;
  uint64_t header_hash;
  char reserved[32];
};
static_assert(sizeof(Preamble) == kAlignment);

int64_t padded(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// A section as pieces of memory, of a multiple of kAlignment bytes where there are several; the
// device's are downloaded one at a time.
struct Section {
  std::string name;
  int64_t piece_bytes = 0;
  std::vector<const void*> pieces;
  bool on_device = false;

  int64_t bytes() const { return piece_bytes * static_cast<int64_t>(pieces.size()); }
};

class SectionReader {
 public:
  explicit SectionReader(Backend& backend) : backend_(backend) {}

  // In pieces that are multiples of kAlignment, the last one padded with zeros.
  template <typename Visit>
  void visit(const Section& section, Visit&& visit) {
    for (const void* piece : section.pieces) {
      if (section.on_device && !backend_.host_memory()) {
        staging_.resize(section.piece_bytes);
        backend_.download(staging_.data(), piece, section.piece_bytes);
        piece = staging_.data();
      }
      const int64_t whole = section.piece_bytes / kAlignment * kAlignment;
      const int64_t rest = section.piece_bytes - whole;
      visit(piece, whole);
      if (rest == 0) continue;
      char last[kAlignment] = {};
      std::memcpy(last, static_cast<const char*>(piece) + whole, rest);
      visit(last, kAlignment);
    }
  }

 private:
  Backend& backend_;
  std::vector<char> staging_;
};

// Hash of the parts of a profile that a session's contents depend on. Costs are among them only
// where there is a budget, so that a profile which gains costs goes on fitting older files.
std::string hash_of(const Profile& profile, const KVConfig& kv) {
  return kv.budgeted() ? profile.hash() : profile.transform_hash();
}

std::string kv_json(const KVConfig& kv) {
  JsonObjectText json;
  for_each_kv_field([&](const auto& field) {
    if (field.coded_only && !kv.coded()) return;
    if (has_kv_value(kv, field)) json.add(field.name, kv_value(kv, field));
  });
  json.add("profile_kind", kv.profile ? kv.profile->kind : "");
  json.add("profile_hash", kv.profile ? hash_of(*kv.profile, kv) : "");
  return json.take();
}

// The whole number that a member is. Throws std::invalid_argument where it is none.
int64_t whole_at(const nlohmann::json& object, const std::string& name) {
  const std::optional<int64_t> number = whole_number(object.at(name));
  if (!number) throw std::invalid_argument("header: " + name + " is no whole number");
  return *number;
}

KVConfig kv_from(const nlohmann::json& json) {
  KVConfig kv;
  for_each_kv_field([&]<typename T>(const KVField<T>& field) {
    if (field.coded_only && !kv.coded()) return;  // value_dtype comes before those
    if constexpr (kIsPerKind<T>) {
      if (field.otherwise == nullptr) {
        if (!json.contains(field.name)) return;
        const nlohmann::json& there = json.at(field.name);
        kv.*field.member = there.get<double>();
        return;
      }
    }
    // Older files have sparsity for keys and values alone.
    const bool older = kIsOverall<T> && !json.contains(field.name);
    const nlohmann::json& value = json.at(older ? "k_" + std::string(field.name) : field.name);
    if constexpr (kIsPerKind<T>) {
      if (value.get<double>() != kv.*field.otherwise) kv.*field.member = value.get<double>();
    } else if constexpr (std::is_enum_v<T>) {
      parse_kv_value(value.get<std::string>(), kv.*field.member);
    } else if constexpr (std::is_integral_v<T> && !std::is_same_v<T, bool>) {
      const int64_t number = whole_at(json, field.name);
      if (!std::in_range<T>(number)) {
        throw std::invalid_argument(std::string("header: ") + field.name + " is " +
                                    std::to_string(number));
      }
      kv.*field.member = static_cast<T>(number);
    } else {
      kv.*field.member = value.get<T>();
    }
  });
  return kv;
}

// dense, queries: the cache's, of the same names.
std::vector<Section> sections_of(const Session::Impl& session, const std::vector<uint8_t>& dense,
                                 const std::vector<uint8_t>& queries) {
  const CacheSpec& spec = *session.spec;
  const SequenceCache& cache = *session.cache;
  std::vector<Section> sections;
  sections.push_back(
      {"tokens", static_cast<int64_t>(session.tokens.size() * 4), {session.tokens.data()}, false});
  if (session.next.whole()) {
    const std::span<const float> logits = session.next.values();
    sections.push_back(
        {"logits", static_cast<int64_t>(logits.size_bytes()), {logits.data()}, false});
  }
  sections.push_back({"dense", static_cast<int64_t>(dense.size()), {dense.data()}, false});
  if (!queries.empty()) {
    sections.push_back({"queries", static_cast<int64_t>(queries.size()), {queries.data()}, false});
  }
  Section pages{"pages", spec.layout.page_bytes, {}, true};
  for (const PageRef& page : cache.pages()) pages.pieces.push_back(page.data());
  sections.push_back(std::move(pages));
  return sections;
}

// A state file, mapped and checked.
struct StateFile {
  MappedFile file;
  JsonTree<> header;
  struct Range {
    const uint8_t* data = nullptr;
    int64_t bytes = 0;
  };
  std::vector<std::pair<std::string, Range>> sections;

  const Range* find(const std::string& name) const {
    for (const auto& [known, range] : sections) {
      if (known == name) return &range;
    }
    return nullptr;
  }
};

StateFile read_checked(const std::filesystem::path& path) {
  StateFile state;
  const auto fail = [&](const std::string& what) { throw StateError(path.string() + ": " + what); };
  try {
    state.file = MappedFile::open(path);
  } catch (const Missing<ModelError>& error) {
    throw Missing<StateError>(error.what());
  } catch (const ModelError& error) {
    throw StateError(error.what());
  }
  const int64_t size = static_cast<int64_t>(state.file.bytes());
  if (size < kAlignment) fail("has " + std::to_string(size) + " bytes, too few for a state file");
  Preamble preamble;
  std::memcpy(&preamble, state.file.data(), sizeof(preamble));
  if (std::memcmp(preamble.magic, kMagic, sizeof(kMagic)) != 0) fail("is not a session state file");
  if (preamble.byte_order != kByteOrder) fail("was written in another byte order, or is damaged");
  if (preamble.version == 1) {
    fail("has format version 1, whose groups are of neighbouring dims; this build reads version " +
         std::to_string(kStoreVersion) + ": compute the session anew");
  }
  if (preamble.version != kStoreVersion) {
    fail("has format version " + std::to_string(preamble.version) + ", this build reads version " +
         std::to_string(kStoreVersion));
  }
  for (char c : preamble.reserved) {
    if (c != 0) fail("is damaged: reserved bytes are not zero");
  }
  if (preamble.header_bytes > kMaxHeaderBytes ||
      kAlignment + padded(static_cast<int64_t>(preamble.header_bytes)) > size) {
    fail("is cut short or damaged: the header is said to have " +
         std::to_string(preamble.header_bytes) + " bytes");
  }
  const int64_t header_bytes = static_cast<int64_t>(preamble.header_bytes);
  const uint8_t* header = state.file.data() + kAlignment;
  Hash64 header_hash;
  header_hash.add_words(header, padded(header_bytes));
  header_hash.add_int(header_bytes);
  if (header_hash.value() != preamble.header_hash) fail("is damaged: header checksum differs");

  int64_t at = kAlignment + padded(header_bytes);
  state.header =
      parse_json_tree({reinterpret_cast<const char*>(header), static_cast<size_t>(header_bytes)});
  for (const auto& entry : state.header->at("sections")) {
    const std::string name = entry.at("name").get<std::string>();
    const int64_t bytes = whole_at(entry, "bytes");
    if (bytes < 0 || bytes > size - at || padded(bytes) > size - at) {
      fail("is cut short: section " + name + " needs " + std::to_string(bytes) +
           " bytes at offset " + std::to_string(at) + " of " + std::to_string(size));
    }
    state.file.prefault(at, at + padded(bytes));
    Hash64 hash;
    hash.add_words(state.file.data() + at, padded(bytes));
    if (hash.hex() != entry.at("hash").get<std::string>()) {
      state.file.check_read();
      fail("is damaged: checksum of section " + name + " at offset " + std::to_string(at) +
           " differs");
    }
    state.sections.emplace_back(name, StateFile::Range{state.file.data() + at, bytes});
    at += padded(bytes);
  }
  if (at != size) {
    fail("has " + std::to_string(size - at) + " bytes after its last section");
  }
  return state;
}

StateFile read(const std::filesystem::path& path) {
  try {
    return read_checked(path);
  } catch (const ModelError& error) {  // the file was cut short meanwhile
    throw StateError(error.what());
  } catch (const nlohmann::json::exception& error) {
    throw StateError(path.string() + ": header: " + error.what());
  } catch (const std::invalid_argument& error) {
    throw StateError(path.string() + ": " + error.what());
  }
}

// The sizes of rows in every layer, which a budget and a profile deal again on loading.
std::string rows_json(const StoreLayout& layout) {
  JsonObjectText json;
  for (const bool is_key : {true, false}) {
    JsonListText rows;
    for (int32_t layer = 0; layer < layout.n_layers; layer++) {
      rows.add_text(std::to_string(slot_of(layout, layer, is_key).row_bytes));
    }
    json.add_text(is_key ? "k" : "v", rows.take());
  }
  return json.take();
}

void check_rows(const nlohmann::json& rows, const StoreLayout& layout, const std::string& where) {
  for (const bool is_key : {true, false}) {
    const auto& saved = rows.at(is_key ? "k" : "v");
    const std::string what = std::string("row_bytes of ") + (is_key ? "keys" : "values");
    if (saved.size() != static_cast<size_t>(layout.n_layers)) {
      throw StateError(where + what + " are of " + std::to_string(saved.size()) + " layers, not " +
                       std::to_string(layout.n_layers));
    }
    for (int32_t layer = 0; layer < layout.n_layers; layer++) {
      const int32_t dealt = slot_of(layout, layer, is_key).row_bytes;
      if (whole_number(saved.at(layer)) == dealt) continue;
      throw StateError(where + what + " in layer " + std::to_string(layer) + " are " +
                       json_text(saved.at(layer)) + ", but its budget and this profile deal " +
                       std::to_string(dealt));
    }
  }
}

std::shared_ptr<const Profile> profile_for(const nlohmann::json& json, const KVConfig& kv,
                                           Model::Impl& engine,
                                           std::shared_ptr<const Profile> given) {
  const std::string kind = json.at("profile_kind").get<std::string>();
  const std::string hash = json.at("profile_hash").get<std::string>();
  if (hash.empty()) {
    if (given) throw StateError("the state was saved without a KV profile, but one was given");
    return nullptr;
  }
  if (!given && kind == "hadamard") given = engine.hadamard_profile();
  if (!given) {
    throw StateError("the state was saved with a KV profile of kind " + kind + " and hash " + hash +
                     ": pass that profile");
  }
  if (const std::string mine = hash_of(*given, kv); mine != hash) {
    throw StateError("the state was saved with the KV profile with hash " + hash + ", not " + mine);
  }
  return given;
}

}  // namespace

void Session::Impl::save(const std::filesystem::path& path) {
  Impl& session = *this;
  session.next.fetch(*session.engine->backend, session.vocab_size());
  const std::vector<uint8_t> dense = session.cache->download_dense();
  const std::vector<uint8_t> queries = session.cache->download_query_magnitude();
  const std::vector<Section> sections = sections_of(session, dense, queries);
  SectionReader reader(*session.engine->backend);

  JsonListText entries;
  for (const Section& section : sections) {
    Hash64 hash;
    reader.visit(section, [&](const void* data, int64_t bytes) { hash.add_words(data, bytes); });
    JsonObjectText entry;
    entry.add("name", section.name);
    entry.add("bytes", section.bytes());
    entry.add("hash", hash.hex());
    entries.add_text(entry.take());
  }
  JsonObjectText header;
  header.add("model_fingerprint", session.engine->fingerprint);
  header.add("tail_dtype", dtype_name(session.spec->tail_dtype));
  header.add("n_tokens", session.tokens.size());
  header.add("max_tokens", session.max_tokens);
  header.add_text("kv", kv_json(session.kv));
  header.add("page_bytes", session.spec->layout.page_bytes);
  if (const int64_t dropped = session.cache->dropped_blocks(); dropped > 0) {
    header.add("dropped_blocks", dropped);
  }
  if (session.kv.budgeted()) header.add_text("row_bytes", rows_json(session.spec->layout));
  header.add_text("sections", entries.take());

  std::string text = header.take();
  Preamble preamble = {};
  std::memcpy(preamble.magic, kMagic, sizeof(kMagic));
  preamble.version = kStoreVersion;
  preamble.byte_order = kByteOrder;
  preamble.header_bytes = text.size();
  text.resize(padded(static_cast<int64_t>(text.size())), '\0');
  Hash64 hash;
  hash.add_words(text.data(), text.size());
  hash.add_int(static_cast<int64_t>(preamble.header_bytes));
  preamble.header_hash = hash.value();

  AtomicFile file(path);
  file.write(&preamble, sizeof(preamble));
  file.write(text.data(), text.size());
  for (const Section& section : sections) {
    reader.visit(section, [&](const void* data, int64_t bytes) { file.write(data, bytes); });
  }
  file.commit();
}

Session Session::load(const Model& model, const std::filesystem::path& path,
                      std::shared_ptr<const Profile> profile) {
  const StateFile state = read(path);
  const std::string where = path.string() + ": ";
  Model::Impl& engine = *model.impl();
  try {
    const nlohmann::json& header = *state.header;
    const std::string fingerprint = header.at("model_fingerprint").get<std::string>();
    if (fingerprint != engine.fingerprint) {
      throw StateError(where + "was saved from the model with fingerprint " + fingerprint +
                       ", this model's is " + engine.fingerprint);
    }
    const std::string tail = header.at("tail_dtype").get<std::string>();
    if (tail != dtype_name(engine.dtype)) {
      throw StateError(where + "was saved with dtype " + tail + ", the model runs in " +
                       dtype_name(engine.dtype));
    }
    KVConfig kv = kv_from(header.at("kv"));
    kv.profile = profile_for(header.at("kv"), kv, engine, std::move(profile));
    const int64_t max_tokens = whole_at(header, "max_tokens");
    if (max_tokens < 1 || max_tokens > engine.config.max_position_embeddings) {
      throw StateError(where + "max_tokens is " + std::to_string(max_tokens));
    }
    auto session = Impl::make(model, kv, static_cast<int32_t>(max_tokens));
    const CacheSpec& spec = *session->spec;
    if (kv.budgeted()) check_rows(header.at("row_bytes"), spec.layout, where);
    const int64_t n = whole_at(header, "n_tokens");
    if (n < 0 || n > max_tokens) {
      throw StateError(where + "n_tokens is " + std::to_string(n) + ", max_tokens " +
                       std::to_string(max_tokens));
    }
    const int64_t dropped =
        header.contains("dropped_blocks") ? whole_at(header, "dropped_blocks") : 0;
    const int64_t most_dropped = spec.unseen_blocks(spec.compressed(n));
    if (dropped < 0 || dropped > most_dropped) {
      throw StateError(where + "dropped_blocks is " + std::to_string(dropped) +
                       ", must be between 0 and " + std::to_string(most_dropped));
    }
    const int64_t n_pages = spec.compressed(n) / kBlockTokens - dropped;
    const auto section = [&](const char* name, int64_t bytes) {
      const StateFile::Range* range = state.find(name);
      const int64_t actual = range == nullptr ? 0 : range->bytes;
      if (range == nullptr || actual != bytes) {
        throw StateError(where + "section " + name + " has " + std::to_string(actual) +
                         " bytes, expected " + std::to_string(bytes));
      }
      return range->data;
    };
    session->tokens.resize(n);
    if (n > 0) std::memcpy(session->tokens.data(), section("tokens", n * 4), n * 4);
    session->check_tokens(session->tokens);
    if (state.find("logits") != nullptr) {
      const int64_t vocab = session->vocab_size();
      std::memcpy(session->next.room(vocab), section("logits", vocab * 4), vocab * 4);
      session->next.set_from_room();
    }
    Backend& backend = *engine.backend;
    const uint8_t* dense = section("dense", spec.dense_bytes(spec.most_dense_tokens));
    const uint8_t* queries = spec.query_bytes > 0 ? section("queries", spec.query_bytes) : nullptr;
    const uint8_t* data = section("pages", n_pages * spec.layout.page_bytes);
    std::vector<PageRef> pages = engine.pool(spec.layout.page_bytes)->allocate(n_pages);
    for (int64_t i = 0; i < n_pages; i++) {
      const uint8_t* page = data + i * spec.layout.page_bytes;
      check_page(spec.layout, page, where + "page " + std::to_string(i));
      backend.upload(pages[i].data(), page, spec.layout.page_bytes);
    }
    session->cache->restore(std::move(pages), dropped, n, dense, queries);
    session->publish_usage();
    state.file.check_read();
    return Session(std::move(session));
  } catch (const ModelError& error) {  // the file was cut short meanwhile
    throw StateError(error.what());
  } catch (const nlohmann::json::exception& error) {
    throw StateError(where + "header: " + error.what());
  } catch (const std::invalid_argument& error) {
    throw StateError(where + error.what());
  }
}

}  // namespace mustafar
