#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "mustafar/error.h"
#include "mustafar/hub.h"

namespace mustafar {
namespace {

namespace fs = std::filesystem;

// A name of the hub: nothing that could lead out of a folder.
bool is_hub_name(std::string_view text) {
  const auto allowed = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' ||
           c == '_' || c == '.';
  };
  return !text.empty() && text.front() != '.' && std::all_of(text.begin(), text.end(), allowed);
}

std::optional<fs::path> from_environment(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == '\0') return std::nullopt;
  return fs::path(value);
}

// Where huggingface_hub keeps its cache: the same variables in the same order.
fs::path hub_cache() {
  if (const auto cache = from_environment("HF_HUB_CACHE")) return *cache;
  if (const auto home = from_environment("HF_HOME")) return *home / "hub";
  if (const auto cache = from_environment("XDG_CACHE_HOME")) return *cache / "huggingface" / "hub";
  const fs::path home = from_environment("HOME").value_or("");
  return home / ".cache" / "huggingface" / "hub";
}

std::optional<fs::path> snapshot_of(const fs::path& repository) {
  std::error_code ignored;
  std::string commit;
  std::ifstream(repository / "refs" / "main") >> commit;
  if (is_hub_name(commit)) {
    const fs::path named = repository / "snapshots" / commit;
    if (fs::is_directory(named, ignored)) return named;
  }
  std::vector<fs::path> all;
  for (fs::directory_iterator at(repository / "snapshots", ignored), end; !ignored && at != end;
       at.increment(ignored)) {
    all.push_back(at->path());
  }
  if (all.size() != 1) return std::nullopt;
  return all[0];
}

bool is_repository_id(std::string_view text) {
  const size_t slash = text.find('/');
  return slash != std::string_view::npos && is_hub_name(text.substr(0, slash)) &&
         is_hub_name(text.substr(slash + 1));
}

// For what is there, but is no folder.
std::string what_to_do(const fs::path& file) {
  const std::string kind = file.extension().string();
  if (kind == ".gguf") {
    return ": a GGUF file; mustafar reads the folder that it was made from (config.json, "
           "tokenizer.json, *.safetensors), which has its own repository on the Hugging Face hub";
  }
  const std::string folder = file.has_parent_path() ? file.parent_path().string() : ".";
  if (kind == ".safetensors" || kind == ".json") {
    return ": a file; give the folder it lies in, " + folder;
  }
  return ": a file, where a model is a folder with config.json, tokenizer.json and *.safetensors";
}

}  // namespace

fs::path find_model_folder(const fs::path& name) {
  std::error_code ignored;
  const std::string id = name.string();
  if (fs::is_directory(name, ignored)) return name;
  if (fs::exists(fs::symlink_status(name, ignored))) throw ModelError(id + what_to_do(name));
  if (!is_repository_id(id)) {
    throw Missing<ModelError>(id + ": no such folder; expected a model folder (config.json, " +
                              "tokenizer.json, *.safetensors) or the id of a repository of the "
                              "Hugging Face hub (organisation/name)");
  }
  std::string folder = "models--" + id;
  folder.replace(folder.find('/'), 1, "--");
  const fs::path repository = hub_cache() / folder;
  if (const auto snapshot = snapshot_of(repository)) return *snapshot;
  throw Missing<ModelError>(
      id + ": expected a model folder or a repository in the local Hugging Face cache, " +
      "found neither (" + repository.string() + " has no snapshot); \"hf download " + id +
      "\" fetches it, and so does Python with the extra mustafar[hub]");
}

}  // namespace mustafar
