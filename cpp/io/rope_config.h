// RoPE's fields of config.json, in both spellings.
#pragma once

#include "io/config_fields.h"
#include "mustafar/model_config.h"

namespace mustafar {

// Needs model_type, head_dim and max_position_embeddings, which it may raise: yarn with a factor
// reaches that many times its original context. Throws ModelError naming the field.
void read_rope(const Fields& fields, double default_theta, ModelConfig& config);

}  // namespace mustafar
