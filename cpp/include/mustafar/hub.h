// Models by the id of their repository on the Hugging Face hub.
#pragma once

#include <filesystem>

namespace mustafar {

// The folder to load a model from, as Model::load does: `name` itself where it is there or has not
// the form of a repository's id ("organisation/name"); else the newest snapshot of the repository
// in the local cache (refs/main, or the only one), which HF_HUB_CACHE, HF_HOME and XDG_CACHE_HOME
// place as huggingface_hub reads them. Nothing is downloaded. Throws ModelError naming the place
// where nothing was found.
std::filesystem::path find_model_folder(const std::filesystem::path& name);

}  // namespace mustafar
