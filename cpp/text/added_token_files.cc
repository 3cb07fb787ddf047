#include "text/added_token_files.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "core/json_text.h"
#include "mustafar/error.h"
#include "text/unicode/utf8.h"

namespace mustafar::text {

namespace {

using nlohmann::json;

constexpr uintmax_t kMaxFileBytes = 64 << 20;
constexpr size_t kMaxTokens = 1 << 18;  // of one file

// Lists of more special tokens: of older and of newer versions of transformers.
constexpr const char* kSpecialLists[] = {"additional_special_tokens", "extra_special_tokens"};

// A JSON object; an empty one where there is no such file.
JsonTree<> read_object(const std::filesystem::path& file) {
  const std::string name = unicode::replace_invalid_utf8(file.string());
  std::error_code error;
  if (!std::filesystem::is_regular_file(file, error)) return JsonTree<>(json::object());
  if (std::filesystem::file_size(file, error) > kMaxFileBytes || error) {
    throw TokenizerError(name + ": more than " + std::to_string(kMaxFileBytes) + " bytes");
  }
  std::ifstream stream(file, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(stream), {}};
  if (stream) {
    try {
      JsonTree<> parsed = parse_json_text(text);
      if (parsed->is_object()) return parsed;
    } catch (const json::exception&) {
    }
  }
  throw TokenizerError(name + ": not a JSON object");
}

// What a file says of a token that is perhaps to be added.
struct Candidate {
  std::string content;
  bool special = false, normalized = false;
  bool lstrip = false, rstrip = false, single_word = false;
};

// "<s>" or {"content": "<s>", ...}; special: what it is where the file does not say.
std::optional<Candidate> candidate(const json& value, bool special) {
  Candidate token;
  if (value.is_string()) {
    token.content = value.get<std::string>();
  } else if (value.is_object() && value.contains("content") && value["content"].is_string()) {
    token.content = value["content"].get<std::string>();
  }
  if (token.content.empty()) return std::nullopt;
  const auto flag = [&](const char* name, bool otherwise) {
    const bool given = value.is_object() && value.contains(name) && value[name].is_boolean();
    return given ? value[name].get<bool>() : otherwise;
  };
  token.special = flag("special", special);
  token.normalized = flag("normalized", !token.special);
  token.lstrip = flag("lstrip", false);
  token.rstrip = flag("rstrip", false);
  token.single_word = flag("single_word", false);
  return token;
}

// Every name of a special token in these files, in transformers' order.
std::vector<Candidate> special_tokens(const json& config, const json& map) {
  std::vector<Candidate> tokens;
  const auto add = [&](const json& value) {
    std::optional<Candidate> token = candidate(value, /*special=*/true);
    if (!token) return;
    token->special = true;
    tokens.push_back(std::move(*token));
  };
  for (const char* name : kSpecialTokenNames) {
    for (const json* file : {&map, &config}) {
      if (!file->contains(name) || (*file)[name].is_null()) continue;
      add((*file)[name]);
      break;
    }
  }
  for (const json* file : {&config, &map}) {
    for (const char* name : kSpecialLists) {
      if (!file->contains(name)) continue;
      for (const json& each : (*file)[name]) add(each);  // of a list, or of an object's values
    }
  }
  return tokens;
}

// The tokens that tokenizer_config.json, or added_tokens.json, gives ids; in the order of these.
std::vector<Candidate> listed_tokens(const std::filesystem::path& folder, const json& config,
                                     const std::vector<Candidate>& special) {
  std::map<int64_t, Candidate> by_id;
  if (config.contains("added_tokens_decoder")) {
    const std::string where =
        (folder / "tokenizer_config.json").string() + ": added_tokens_decoder: ";
    if (!config["added_tokens_decoder"].is_object()) throw TokenizerError(where + "no object");
    for (const auto& [id, value] : config["added_tokens_decoder"].items()) {
      const bool is_id =
          !id.empty() && id.size() <= 9 &&
          std::all_of(id.begin(), id.end(), [](char c) { return c >= '0' && c <= '9'; });
      auto token = candidate(value, /*special=*/false);
      if (!is_id || !token) throw TokenizerError(where + unicode::in_quotes(id) + " is no token");
      by_id.emplace(std::stoll(id), std::move(*token));
    }
  } else {
    const JsonTree<> added = read_object(folder / "added_tokens.json");
    for (const auto& item : added->items()) {
      const std::string& content = item.key();  // clang 14 captures no structured bindings
      const auto& id = item.value();
      if (!id.is_number_unsigned()) {
        throw TokenizerError((folder / "added_tokens.json").string() + ": " +
                             unicode::in_quotes(content) + " has no id");
      }
      const bool is_special = std::any_of(special.begin(), special.end(),
                                          [&](const Candidate& s) { return s.content == content; });
      if (auto token = candidate(json(content), is_special)) {
        by_id.emplace(id.get<int64_t>(), std::move(*token));
      }
    }
  }
  if (by_id.size() > kMaxTokens) {
    throw TokenizerError(folder.string() + ": more than " + std::to_string(kMaxTokens) +
                         " added tokens");
  }
  std::vector<Candidate> tokens;
  for (auto& [id, token] : by_id) tokens.push_back(std::move(token));
  return tokens;
}

}  // namespace

FolderEnds read_ends(const std::filesystem::path& folder) {
  FolderEnds ends;
  const auto object = [&](const char* file) {
    try {
      return read_object(folder / file);
    } catch (const TokenizerError&) {
      return JsonTree<>(json::object());
    }
  };
  for (const char* file : {"tokenizer_config.json", "special_tokens_map.json"}) {
    const JsonTree<> tree = object(file);
    const json& config = *tree;
    for (auto& [name, tokens] :
         {std::pair("bos_token", &ends.bos_tokens), std::pair("eos_token", &ends.eos_tokens)}) {
      if (!config.contains(name)) continue;
      if (auto token = candidate(config[name], true)) tokens->push_back(token->content);
    }
  }
  for (const char* file : {"config.json", "generation_config.json"}) {
    const JsonTree<> tree = object(file);
    const json& config = *tree;
    for (auto& [name, ids] :
         {std::pair("bos_token_id", &ends.bos_ids), std::pair("eos_token_id", &ends.eos_ids)}) {
      if (!config.contains(name)) continue;
      const auto add = [&, to = ids](const json& id) {
        if (id.is_number_integer()) to->push_back(id.get<int64_t>());
      };
      const json& value = config[name];
      if (!value.is_array()) add(value);
      if (value.is_array()) std::for_each(value.begin(), value.end(), add);
    }
  }
  return ends;
}

void add_tokens_of_folder(const std::filesystem::path& folder, TokenizerJson* json_file) {
  const JsonTree<> config = read_object(folder / "tokenizer_config.json");
  const JsonTree<> map = config->contains("added_tokens_decoder")
                             ? JsonTree<>(json::object())
                             : read_object(folder / "special_tokens_map.json");
  const std::vector<Candidate> special = special_tokens(*config, *map);
  std::vector<Candidate> tokens = listed_tokens(folder, *config, special);
  tokens.insert(tokens.end(), special.begin(), special.end());
  if (tokens.empty()) return;

  json& added = (*json_file->root)["added_tokens"];
  if (added.is_null()) added = json::array();
  if (!added.is_array()) return;  // refused where it is parsed
  std::unordered_set<std::string> known;
  int64_t next = static_cast<int64_t>(json_file->vocab.size());
  for (const json& each : added) {
    if (!each.is_object()) continue;
    if (each.contains("content") && each["content"].is_string()) {
      known.insert(each["content"].get<std::string>());
    }
    const auto id = each.contains("id") ? whole_number(each["id"]) : std::nullopt;
    if (id && *id < INT32_MAX) next = std::max(next, *id + 1);
  }
  std::erase_if(tokens,
                [&](const Candidate& token) { return !known.insert(token.content).second; });
  if (tokens.empty()) return;
  std::unordered_map<std::string_view, uint32_t> vocab;
  for (const auto& entry : json_file->vocab) {
    vocab.emplace(std::string_view(json_file->vocab_bytes).substr(entry.offset, entry.length),
                  entry.id);
    next = std::max(next, int64_t{entry.id} + 1);
  }
  for (const Candidate& token : tokens) {
    const auto in_vocab = vocab.find(token.content);
    JsonTree<> entry(json::object());
    (*entry)["id"] = in_vocab == vocab.end() ? next++ : int64_t{in_vocab->second};
    (*entry)["content"] = token.content;
    (*entry)["special"] = token.special;
    (*entry)["normalized"] = token.normalized;
    (*entry)["lstrip"] = token.lstrip;
    (*entry)["rstrip"] = token.rstrip;
    (*entry)["single_word"] = token.single_word;
    added.push_back(std::move(*entry));
  }
}

}  // namespace mustafar::text
