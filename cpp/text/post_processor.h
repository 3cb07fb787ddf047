// The post_processor of tokenizer.json: what add_special puts around the ids of a text.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "text/json_field.h"

namespace mustafar::text {

struct PostProcessor {
  std::vector<int32_t> prefix, suffix;

  // field: an object, or null for none. is_token tells whether an id exists. Throws TokenizerError,
  // also for unsupported types.
  static PostProcessor parse(const JsonField& field, const std::function<bool(int64_t)>& is_token);
};

}  // namespace mustafar::text
