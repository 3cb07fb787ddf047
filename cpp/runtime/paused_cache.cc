#include "runtime/paused_cache.h"

#include <utility>

namespace mustafar {

PausedCache::PausedCache(Backend& backend, const SequenceCache& cache, size_t rung)
    : dense_(cache.download_dense()),
      query_magnitude_(cache.download_query_magnitude()),
      length_(cache.length()),
      dropped_blocks_(cache.dropped_blocks()),
      rung_(rung),
      long_rope_(cache.long_rope()) {
  const int64_t page_bytes = cache.spec().layout.page_bytes;
  pages_.resize(cache.pages().size() * page_bytes);
  for (size_t i = 0; i < cache.pages().size(); i++) {
    backend.download(pages_.data() + i * page_bytes, cache.pages()[i].data(), page_bytes);
  }
}

int64_t PausedCache::bytes_of(const SequenceCache& cache) {
  const CacheSpec& spec = cache.spec();
  return static_cast<int64_t>(cache.pages().size()) * spec.layout.page_bytes +
         spec.dense_bytes(spec.most_dense_tokens) + spec.query_bytes;
}

int64_t PausedCache::bytes() const {
  return static_cast<int64_t>(pages_.size() + dense_.size() + query_magnitude_.size());
}

SequenceCache PausedCache::restored(Model::Impl& engine,
                                    std::shared_ptr<const CacheSpec> spec) const {
  const int64_t page_bytes = spec->layout.page_bytes;
  const std::shared_ptr<BlockPool> pool = engine.pool(page_bytes);
  std::vector<PageRef> pages = pool->allocate(static_cast<int64_t>(pages_.size()) / page_bytes);
  for (size_t i = 0; i < pages.size(); i++) {
    engine.backend->upload(pages[i].data(), pages_.data() + i * page_bytes, page_bytes);
  }
  SequenceCache cache(*engine.backend, pool, engine.budget, std::move(spec), long_rope_);
  cache.restore(std::move(pages), dropped_blocks_, length_, dense_.data(), query_magnitude_.data());
  return cache;
}

}  // namespace mustafar
