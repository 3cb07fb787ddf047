#include "text/tokenizer_json.h"

#include <algorithm>
#include <fstream>

#include "text/unicode/utf8.h"

namespace mustafar::text {

namespace {

using nlohmann::json;

constexpr uintmax_t kMaxFileBytes = 1 << 30;
constexpr size_t kMaxDepth = 64;
constexpr uint64_t kMaxUnusedIds = 1 << 16;  // beside one for each token

// Receives the parser's events: those inside model.vocab and model.merges go to TokenizerJson's
// flat storage, all others build the document.
class Reader {
 public:
  explicit Reader(TokenizerJson* out) : out_(*out) {}

  bool null() { return scalar(json(nullptr)); }
  bool boolean(bool value) { return scalar(json(value)); }
  bool number_integer(int64_t value) {
    if (mode_ == Mode::kVocab) bad_id(std::to_string(value));
    return scalar(json(value));
  }
  bool number_unsigned(uint64_t value) {
    if (mode_ != Mode::kVocab) return scalar(json(value));
    if (value > uint64_t{kMaxTokenId}) bad_id(std::to_string(value));
    const auto length = static_cast<uint32_t>(out_.vocab_bytes.size() - token_offset_);
    out_.vocab.push_back({token_offset_, length, static_cast<uint32_t>(value)});
    return true;
  }
  bool number_float(double value, const std::string& spelling) {
    if (mode_ == Mode::kVocab) bad_id(spelling);
    return scalar(json(value));
  }
  bool binary(json::binary_t&) { return false; }

  bool string(std::string& value) {
    switch (mode_) {
      case Mode::kDocument:
        return scalar(json(std::move(value)));
      case Mode::kVocab:
        bad_id(unicode::in_quotes(value));
      case Mode::kMerges:
        split_merge(value);
        return true;
      case Mode::kMergePair:
        if (++pair_parts_ > 2) bad_merge("has more than two parts");
        (pair_parts_ == 1 ? left_length_ : right_length_) = static_cast<uint32_t>(value.size());
        out_.merge_bytes += value;
        return true;
    }
    return true;
  }

  bool key(std::string& value) {
    if (mode_ == Mode::kVocab) {
      token_offset_ = static_cast<uint32_t>(out_.vocab_bytes.size());
      out_.vocab_bytes += value;
    } else {
      key_ = std::move(value);
    }
    return true;
  }

  bool start_object(size_t) {
    if (in_model() && key_ == "vocab") {
      mode_ = Mode::kVocab;
      out_.has_vocab = true;
      return true;
    }
    return start(json::object());
  }
  bool end_object() { return end(); }

  bool start_array(size_t) {
    if (mode_ == Mode::kMerges) {
      mode_ = Mode::kMergePair;
      pair_parts_ = 0;
      return true;
    }
    if (in_model() && key_ == "merges") {
      mode_ = Mode::kMerges;
      out_.has_merges = true;
      return true;
    }
    return start(json::array());
  }
  bool end_array() {
    if (mode_ != Mode::kMergePair) return end();
    if (pair_parts_ != 2) bad_merge("has fewer than two parts");
    add_merge();
    mode_ = Mode::kMerges;
    return true;
  }

  bool parse_error(size_t position, const std::string&, const json::exception& error) {
    std::string what = error.what();
    if (const size_t colon = what.find(": "); colon != std::string::npos) what.erase(0, colon + 2);
    throw TokenizerError(out_.file + ": not valid JSON at byte " + std::to_string(position) + ": " +
                         unicode::replace_invalid_utf8(what));
  }

 private:
  enum class Mode { kDocument, kVocab, kMerges, kMergePair };

  [[noreturn]] void fail(const std::string& what) const {
    throw TokenizerError(out_.file + ": " + what);
  }
  [[noreturn]] void bad_id(const std::string& found) const {
    fail("model.vocab: the id of token " +
         unicode::in_quotes(std::string_view(out_.vocab_bytes).substr(token_offset_)) +
         " must be an integer from 0 to " + std::to_string(kMaxTokenId) + ", found " + found);
  }
  [[noreturn]] void bad_merge(const std::string& what) const {
    fail("model.merges[" + std::to_string(out_.merges.size()) + "] " + what);
  }

  // Right inside the value of the top-level key "model"?
  bool in_model() const {
    return mode_ == Mode::kDocument && stack_.size() == 2 && model_depth_ == 2;
  }

  void split_merge(std::string_view text) {
    if (text.starts_with("#version")) return;
    const size_t space = text.find(' ');
    if (space == std::string_view::npos || text.find(' ', space + 1) != std::string_view::npos) {
      bad_merge("must be two tokens with a space between, found " + unicode::in_quotes(text));
    }
    left_length_ = static_cast<uint32_t>(space);
    right_length_ = static_cast<uint32_t>(text.size() - space - 1);
    out_.merge_bytes.append(text.substr(0, space)).append(text.substr(space + 1));
    add_merge();
  }
  void add_merge() {
    if (left_length_ == 0 || right_length_ == 0) bad_merge("has an empty part");
    out_.merges.push_back({left_length_, right_length_});
  }

  // Where the next value of the document belongs.
  json* place(json value) {
    if (stack_.empty()) {
      *out_.root = std::move(value);
      return &*out_.root;
    }
    json& parent = *stack_.back();
    if (parent.is_array()) {
      parent.push_back(std::move(value));
      return &parent.back();
    }
    json& member = parent[std::move(key_)];
    take_apart(member);  // of a key that came before
    return &(member = std::move(value));
  }

  bool scalar(json value) {
    if (mode_ == Mode::kVocab) bad_id(value.dump());
    if (mode_ != Mode::kDocument) bad_merge("must be a string or a pair of strings");
    place(std::move(value));
    return true;
  }
  bool start(json value) {
    if (mode_ == Mode::kVocab) bad_id("an object or array");
    if (mode_ != Mode::kDocument) bad_merge("must be a string or a pair of strings");
    if (stack_.size() >= kMaxDepth) {
      fail("nested more than " + std::to_string(kMaxDepth) + " levels deep");
    }
    if (stack_.size() == 1 && key_ == "model" && value.is_object()) model_depth_ = 2;
    stack_.push_back(place(std::move(value)));
    return true;
  }
  bool end() {
    if (mode_ != Mode::kDocument) {
      mode_ = Mode::kDocument;
      return true;
    }
    stack_.pop_back();
    if (stack_.size() < model_depth_) model_depth_ = 0;
    return true;
  }

  TokenizerJson& out_;
  Mode mode_ = Mode::kDocument;
  std::vector<json*> stack_;  // open containers; a child never moves while it is open
  size_t model_depth_ = 0;    // 2 while the model object is open
  std::string key_;
  uint32_t token_offset_ = 0;
  uint32_t left_length_ = 0, right_length_ = 0;
  int pair_parts_ = 0;
};

}  // namespace

TokenizerJson parse_tokenizer_json(std::string_view text, std::string file) {
  TokenizerJson out;
  out.file = std::move(file);
  if (text.starts_with("version https://git-lfs")) {
    throw TokenizerError(out.file +
                         ": a git-LFS pointer, not the file; fetch it with 'git lfs pull'");
  }
  Reader reader(&out);
  json::sax_parse(text.data(), text.data() + text.size(), &reader);
  if (!out.root->is_object()) {
    throw TokenizerError(out.file + ": expected a JSON object, found " + out.root->type_name());
  }
  return out;
}

TokenizerJson read_tokenizer_json(const std::filesystem::path& path) {
  std::error_code error;
  const bool is_folder = std::filesystem::is_directory(path, error);
  const std::filesystem::path file = is_folder ? path / "tokenizer.json" : path;
  const std::string name = unicode::replace_invalid_utf8(file.string());
  const auto status = std::filesystem::status(file, error);
  if (!std::filesystem::exists(status)) {
    throw Missing<TokenizerError>(name + ": no such file");
  }
  if (!std::filesystem::is_regular_file(status))
    throw TokenizerError(name + ": not a regular file");
  const uintmax_t size = std::filesystem::file_size(file, error);
  if (error) throw TokenizerError(name + ": " + error.message());
  if (size > kMaxFileBytes) {
    throw TokenizerError(name + ": " + std::to_string(size) + " bytes, more than the limit of " +
                         std::to_string(kMaxFileBytes));
  }
  std::string text(size, '\0');
  std::ifstream stream(file, std::ios::binary);
  if (!stream) throw TokenizerError(name + ": can't be opened");
  stream.read(text.data(), static_cast<std::streamsize>(size));
  if (static_cast<uintmax_t>(stream.gcount()) != size) {
    throw TokenizerError(name + ": only " + std::to_string(stream.gcount()) + " of " +
                         std::to_string(size) + " bytes can be read");
  }
  return parse_tokenizer_json(text, name);
}

Vocab build_vocab(const TokenizerJson& json, int64_t max_added_id, size_t added_count) {
  int64_t limit = max_added_id + 1;
  for (const auto& token : json.vocab) limit = std::max<int64_t>(limit, int64_t{token.id} + 1);
  const size_t count = json.vocab.size() + added_count;
  // Ids may have gaps, but a table much larger than its content tells of a broken file.
  if (static_cast<uint64_t>(limit) > 2 * count + kMaxUnusedIds) {
    throw TokenizerError(json.file + ": the largest token id is " + std::to_string(limit - 1) +
                         ", but there are only " + std::to_string(count) + " tokens");
  }
  Vocab vocab(static_cast<int32_t>(limit), json.vocab.size(), json.vocab_bytes.size());
  for (const auto& entry : json.vocab) {
    const auto token = std::string_view(json.vocab_bytes).substr(entry.offset, entry.length);
    const auto id = static_cast<int32_t>(entry.id);
    switch (vocab.add(token, id)) {
      case Vocab::Conflict::kNone:
        break;
      case Vocab::Conflict::kToken:
        throw TokenizerError(json.file + ": model.vocab lists token " + unicode::in_quotes(token) +
                             " twice");
      case Vocab::Conflict::kId:
        throw TokenizerError(json.file + ": model.vocab gives id " + std::to_string(id) + " to " +
                             unicode::in_quotes(vocab.token(id)) + " and to " +
                             unicode::in_quotes(token));
    }
  }
  return vocab;
}

MergeTable build_merges(const TokenizerJson& json, const Vocab& vocab) {
  MergeTable table{PairMap(json.merges.size()), {}};
  table.pairs.reserve(json.merges.size());
  size_t offset = 0;
  for (size_t rank = 0; rank < json.merges.size(); rank++) {
    const auto& merge = json.merges[rank];
    const auto both =
        std::string_view(json.merge_bytes).substr(offset, merge.left_length + merge.right_length);
    offset += both.size();
    const auto id_of = [&](std::string_view token) {
      const auto id = vocab.find(token);
      if (!id) {
        throw TokenizerError(json.file + ": model.merges[" + std::to_string(rank) +
                             "]: " + unicode::in_quotes(token) + " is not in model.vocab");
      }
      return static_cast<uint32_t>(*id);
    };
    const uint64_t pair =
        pair_key(id_of(both.substr(0, merge.left_length)), id_of(both.substr(merge.left_length)));
    table.map.set(pair, {static_cast<uint32_t>(rank), id_of(both)});
    table.pairs.push_back(pair);
  }
  return table;
}

}  // namespace mustafar::text
