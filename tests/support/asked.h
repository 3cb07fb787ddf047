// A request whose prompt is computed in several calls, and a session that makes the same calls.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "mustafar/sampling.h"
#include "mustafar/session.h"

namespace mustafar::testing {

// A prompt that is computed in several calls.
struct Asked {
  std::vector<int32_t> ids;
  std::vector<int64_t> prefixes;
  SamplingParams params;
};

// What a session makes by the same calls.
inline GenerateResult alone(const Model& model, const KVConfig& kv, const Asked& request) {
  Session session(model, kv);
  int64_t done = 0;
  for (const int64_t end : request.prefixes) {
    session.prefill(std::span(request.ids).subspan(done, end - done));
    done = end;
  }
  return session.generate(std::vector<int32_t>(request.ids.begin() + done, request.ids.end()),
                          request.params);
}

}  // namespace mustafar::testing
