// Caches on their way to another spec.
#include <algorithm>
#include <cstddef>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "kv/sequence_cache.h"
#include "kv/slab_size.h"
#include "mustafar/error.h"

namespace mustafar {
namespace {

// Where one page is used.
struct PageUse {
  size_t cache;  // of those that are recoded
  size_t index;  // of its pages
};

// A new page that has no place yet.
struct Carried {
  std::unique_ptr<DeviceMemory> memory;
  std::vector<PageUse> uses;
};

// Compresses 64 dense rows [n_layers][2][n_kv_heads][64][D] into a page. end: position behind them.
void compress_rows(Backend& backend, const CacheSpec& spec, void* rows, int64_t end, uint8_t* page,
                   Workspace& workspace) {
  CommitStep step;
  step.layout = &spec.layout;
  step.sequence.dense = step.dense_out = static_cast<uint8_t*>(rows);
  step.sequence.dense_capacity = kBlockTokens;
  step.sequence.dense_tokens = step.dense_tokens = kBlockTokens;
  if (spec.transform != nullptr) step.sequence.transform = *spec.transform;
  if (spec.codes != nullptr) step.sequence.codes = *spec.codes;
  step.new_pages = &page;
  step.n_new_blocks = 1;
  step.end_pos = static_cast<int32_t>(end);
  step.k_policy = spec.config.k_policy;
  step.v_policy = spec.config.v_policy;
  backend.commit({&step, 1}, 0, spec.n_layers, workspace);
}

}  // namespace

void SequenceCache::recode(std::span<SequenceCache* const> caches,
                           const std::shared_ptr<BlockPool>& pool,
                           const std::shared_ptr<const CacheSpec>& spec) {
  if (caches.empty()) return;
  Backend& backend = *caches[0]->backend_;
  // By address, and so slab by slab: a slab is given back with its last page, whichever of the
  // sequences these belong to, and until then what takes their place is carried along.
  std::map<const uint8_t*, std::vector<PageUse>, std::less<>> uses;
  for (size_t c = 0; c < caches.size(); c++) {
    for (size_t i = 0; i < caches[c]->pages_.size(); i++) {
      uses[caches[c]->pages_[i].data()].push_back({c, i});
    }
  }
  const std::unique_ptr<Workspace> workspace = backend.make_workspace();
  const std::unique_ptr<DeviceMemory> rows = backend.allocate(spec->dense_bytes(kBlockTokens));
  const KVTransform to = spec->transform != nullptr ? *spec->transform : KVTransform{};
  const int64_t page_bytes = spec->layout.page_bytes;
  std::deque<Carried> carried;
  const auto put = [&](const std::vector<PageUse>& at, const PageRef& page) {
    for (const PageUse& use : at) caches[use.cache]->pages_[use.index] = page;
  };
  const auto put_carried = [&] {
    while (!carried.empty()) {
      const PageRef page = std::move(pool->allocate(1)[0]);
      backend.copy(page.data(), carried.front().memory->data(), page_bytes);
      put(carried.front().uses, page);
      carried.pop_front();
    }
  };
  for (auto& [address, at] : uses) {
    const SequenceCache& first = *caches[at[0].cache];
    backend.expand(first.view_of(first.dense_), static_cast<int32_t>(at[0].index), to,
                   static_cast<uint8_t*>(rows->data()), kBlockTokens);
    put(at, PageRef());  // the old page has gone before the new one is asked for
    const int64_t block = first.dropped_blocks_ + static_cast<int64_t>(at[0].index);
    const int64_t end = spec->config.sink_tokens + (block + 1) * kBlockTokens;
    try {
      put_carried();
      const PageRef page = std::move(pool->allocate(1)[0]);
      compress_rows(backend, *spec, rows->data(), end, page.data(), *workspace);
      put(at, page);
    } catch (const OutOfMemory&) {
      Carried page{backend.allocate(page_bytes + kSlabSlack), std::move(at)};
      compress_rows(backend, *spec, rows->data(), end, static_cast<uint8_t*>(page.memory->data()),
                    *workspace);
      carried.push_back(std::move(page));
    }
  }
  put_carried();
  for (SequenceCache* cache : caches) {
    if (cache->dense_tokens() > 0) {
      backend.expand(cache->view_of(cache->dense_), Backend::kDenseRows, to,
                     static_cast<uint8_t*>(cache->dense_.memory.data()), cache->dense_.capacity);
    }
    cache->query_magnitude_ = KVMemory();
    cache->spec_ = spec;
    cache->pool_ = pool;
    cache->refresh_page_table();
  }
}

int64_t SequenceCache::recode_gain(std::span<SequenceCache* const> caches, const BlockPool& pool) {
  std::map<const uint8_t*, int64_t, std::less<>> pages;  // distinct ones
  std::vector<const PageRef*> references;
  int64_t gain = 0;
  for (const SequenceCache* cache : caches) {
    for (const PageRef& page : cache->pages_) {
      pages[page.data()]++;
      references.push_back(&page);
    }
    gain += cache->query_magnitude_.bytes();
  }
  if (references.empty()) return gain;
  const int64_t n_new = static_cast<int64_t>(pages.size()) - pool.free_pages();
  gain += caches[0]->pool_->bytes_freed_by(references);
  return gain - std::max<int64_t>(0, n_new) * slab_bytes(pool.page_bytes(), 1);
}

}  // namespace mustafar
