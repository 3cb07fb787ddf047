// Reads the architecture from a Hugging Face folder.
//
// Both spellings in use are understood: rope_theta, rope_scaling and torch_dtype, and since
// transformers 5 rope_parameters and dtype. Fields that change the computation in a way the runtime
// does not have (other activations, kinds of quantised weights, RoPE scalings or families) are
// refused by name; fields that do not are ignored.
#pragma once

#include <filesystem>

#include "mustafar/model_config.h"

namespace mustafar {

// config.json, and generation_config.json where there is one. Throws ModelError naming the file,
// the field, what was expected and what was found. tie_word_embeddings is the flag as written;
// Checkpoint corrects it by the tensors.
ModelConfig read_model_config(const std::filesystem::path& folder);

}  // namespace mustafar
