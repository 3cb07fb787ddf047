// What a paused sequence keeps of its cache: a copy in host memory, beside kv_budget.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kv/sequence_cache.h"
#include "runtime/model_impl.h"

namespace mustafar {

class PausedCache {
 public:
  // Compressed pages as they are, and what is dense. Throws std::bad_alloc. rung: of the
  // scheduler's settings, the cache's.
  PausedCache(Backend& backend, const SequenceCache& cache, size_t rung);
  // Bytes that a copy of a cache takes.
  static int64_t bytes_of(const SequenceCache& cache);

  int64_t bytes() const;
  int64_t length() const { return length_; }
  size_t rung() const { return rung_; }
  // The cache again, bit for bit. spec: that of its rung. Throws OutOfMemory.
  SequenceCache restored(Model::Impl& engine, std::shared_ptr<const CacheSpec> spec) const;

 private:
  std::vector<uint8_t> pages_, dense_, query_magnitude_;
  int64_t length_ = 0;
  int64_t dropped_blocks_ = 0;
  size_t rung_ = 0;
  bool long_rope_ = false;
};

}  // namespace mustafar
