// Where the small model that ships with the package lies.
#pragma once

#include <filesystem>

namespace mustafar::cli {

// MUSTAFAR_DEMO_MODEL, or the folder beside this program as wheels, installations and build trees
// lay it out. Throws ModelError where it is not there.
std::filesystem::path demo_model_folder();

}  // namespace mustafar::cli
