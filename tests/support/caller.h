// Prompts and steps over a cache, below sessions: of a spec that no session has.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kv/sequence_cache.h"
#include "mustafar/model.h"
#include "runtime/model_impl.h"

namespace mustafar::testing {

class Caller {
 public:
  Caller(const Model& model, std::shared_ptr<const CacheSpec> spec, int64_t max_tokens)
      : engine_(*model.impl()),
        buffers_(*engine_.backend),
        cache(engine_.new_cache(spec, max_tokens)) {}

  std::vector<float> prefill(const std::vector<int32_t>& ids) {
    Prefill call(*engine_.llama, cache, ids, buffers_);
    while (call.step()) {
    }
    std::vector<float> logits(engine_.config.vocab_size);
    call.logits(static_cast<int64_t>(ids.size()) - 1, 1, logits.data());
    call.finish();
    return logits;
  }
  std::vector<float> decode(int32_t id) {
    std::vector<float> logits(engine_.config.vocab_size);
    SequenceCache* const caches[] = {&cache};
    engine_.llama->decode(caches, {&id, 1}, logits.data(), buffers_);
    return logits;
  }

 private:
  Model::Impl& engine_;
  ForwardBuffers buffers_;

 public:
  SequenceCache cache;
};

}  // namespace mustafar::testing
