#include "kv/block_pool.h"

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <utility>

#include "kv/slab_size.h"
#include "mustafar/error.h"

namespace mustafar {
namespace {

// Small slabs on the host keep what is held close to what is used; device allocations are dear.
constexpr int64_t kSmallHostSlab = 256 << 10;
constexpr int64_t kSmallDeviceSlab = 32 << 20;
// One part in so many of a budget is kept for what is needed now: no page of it is held ahead.
constexpr int64_t kReservedShare = 8;

}  // namespace

int64_t KVBudget::used() const {
  std::lock_guard lock(mutex_);
  return used_;
}

int64_t KVBudget::peak() const {
  std::lock_guard lock(mutex_);
  return peak_;
}

int64_t KVBudget::available() const {
  if (limit_ == 0) return std::numeric_limits<int64_t>::max();
  std::lock_guard lock(mutex_);
  return limit_ - used_;
}

void KVBudget::check_locked(int64_t bytes) const {
  if (limit_ != 0 && bytes > limit_ - used_) {
    throw OutOfMemory("the KV cache needs " + std::to_string(bytes) + " more bytes, but " +
                      std::to_string(used_) + " of kv_budget = " + std::to_string(limit_) +
                      " bytes are in use: raise kv_budget, raise sparsity or shorten the context");
  }
}

void KVBudget::check(int64_t bytes) const {
  std::lock_guard lock(mutex_);
  check_locked(bytes);
}

void KVBudget::take(int64_t bytes) {
  std::lock_guard lock(mutex_);
  check_locked(bytes);
  used_ += bytes;
  peak_ = std::max(peak_, used_);
}

void KVBudget::give(int64_t bytes) {
  std::lock_guard lock(mutex_);
  used_ -= bytes;
}

KVMemory::KVMemory(Backend& backend, std::shared_ptr<KVBudget> budget, int64_t bytes)
    : budget_(std::move(budget)) {
  budget_->take(bytes);
  try {
    memory_ = backend.allocate(bytes);
  } catch (...) {
    budget_->give(bytes);
    throw;
  }
}

KVMemory::~KVMemory() {
  if (memory_) budget_->give(memory_->bytes());
}

KVMemory::KVMemory(KVMemory&& other) noexcept
    : budget_(std::move(other.budget_)), memory_(std::move(other.memory_)) {}

KVMemory& KVMemory::operator=(KVMemory&& other) noexcept {
  std::swap(budget_, other.budget_);
  std::swap(memory_, other.memory_);
  return *this;
}

struct PageRef::Slab {
  KVMemory memory;
  std::vector<int32_t> references;  // of every page; 0: free
  int32_t used = 0;                 // pages

  int32_t n_pages() const { return static_cast<int32_t>(references.size()); }
};

PageRef::PageRef(const PageRef& other)
    : pool_(other.pool_), slab_(other.slab_), index_(other.index_), data_(other.data_) {
  if (pool_) pool_->retain(slab_, index_);
}

PageRef::PageRef(PageRef&& other) noexcept
    : pool_(std::move(other.pool_)),
      slab_(std::exchange(other.slab_, nullptr)),
      index_(other.index_),
      data_(std::exchange(other.data_, nullptr)) {}

PageRef& PageRef::operator=(PageRef other) noexcept {
  std::swap(pool_, other.pool_);
  std::swap(slab_, other.slab_);
  std::swap(index_, other.index_);
  std::swap(data_, other.data_);
  return *this;
}

PageRef::~PageRef() {
  if (pool_) pool_->release(slab_, index_);
}

BlockPool::BlockPool(Backend& backend, std::shared_ptr<KVBudget> budget, int64_t page_bytes)
    : backend_(backend),
      budget_(std::move(budget)),
      page_bytes_(page_bytes),
      small_slab_bytes_(backend.host_memory() ? kSmallHostSlab : kSmallDeviceSlab) {}

BlockPool::~BlockPool() = default;

std::vector<PageRef> BlockPool::allocate(int64_t n) {
  std::vector<PageRef> pages;
  pages.reserve(n);
  const std::shared_ptr<BlockPool> self = shared_from_this();
  // References are counted under the lock. Where a slab is refused the lock is given up first,
  // since dropping `pages` takes it to return those already taken.
  std::unique_lock lock(mutex_);
  const auto take_from = [&](PageRef::Slab* slab) {
    for (int32_t i = 0; i < slab->n_pages() && static_cast<int64_t>(pages.size()) < n; i++) {
      if (slab->references[i] != 0) continue;
      slab->references[i] = 1;
      slab->used++;
      free_pages_--;
      PageRef page;
      page.pool_ = self;
      page.slab_ = slab;
      page.index_ = i;
      page.data_ = static_cast<uint8_t*>(slab->memory.data()) + i * page_bytes_;
      pages.push_back(std::move(page));
    }
  };
  try {
    if (n > free_pages_) budget_->check(slab_bytes(page_bytes_, n - free_pages_));
    while (static_cast<int64_t>(pages.size()) < n) {
      const int64_t missing = n - static_cast<int64_t>(pages.size());
      take_from(free_pages_ > 0 ? fullest_slab() : add_slab(missing));
    }
  } catch (...) {
    lock.unlock();  // releasing the pages takes the lock
    pages.clear();
    throw;
  }
  return pages;
}

PageRef::Slab* BlockPool::fullest_slab() {
  PageRef::Slab* fullest = nullptr;
  for (const auto& slab : slabs_) {
    if (slab->used == slab->n_pages()) continue;
    if (fullest == nullptr ||
        int64_t{slab->used} * fullest->n_pages() > int64_t{fullest->used} * slab->n_pages()) {
      fullest = slab.get();
    }
  }
  return fullest;
}

PageRef::Slab* BlockPool::add_slab(int64_t missing) {
  const auto bytes = [&](int64_t n_pages) { return slab_bytes(page_bytes_, n_pages); };
  int64_t n_pages = next_slab_pages(page_bytes_, small_slab_bytes_, held_bytes_, missing);
  // Pages that nobody has asked for yet must not use up a budget that others are short of.
  if (budget_->available() - bytes(n_pages) < budget_->limit() / kReservedShare) {
    n_pages = std::min(n_pages, missing);
  }
  auto slab = std::make_unique<PageRef::Slab>();
  while (slab->memory.data() == nullptr) {
    try {
      slab->memory = KVMemory(backend_, budget_, bytes(n_pages));
    } catch (const OutOfMemory&) {
      if (n_pages == 1) throw;
      n_pages = n_pages > missing ? missing : n_pages / 2;  // free memory may be in smaller pieces
    }
  }
  slab->references.assign(n_pages, 0);
  slabs_.push_back(std::move(slab));
  held_bytes_ += bytes(n_pages);
  free_pages_ += n_pages;
  return slabs_.back().get();
}

int64_t BlockPool::bytes_freed_by(std::span<const PageRef* const> references) const {
  std::lock_guard lock(mutex_);
  std::map<PageRef::Slab*, std::map<int32_t, int32_t>> dropped;  // of every page
  for (const PageRef* page : references) dropped[page->slab_][page->index_]++;
  int64_t bytes = 0;
  for (const auto& [slab, pages] : dropped) {
    int32_t freed = 0;
    for (const auto& [index, n] : pages) freed += slab->references[index] == n ? 1 : 0;
    if (freed == slab->used) bytes += slab->memory.bytes();
  }
  return bytes;
}

int64_t BlockPool::allocated_bytes() const {
  std::lock_guard lock(mutex_);
  return held_bytes_;
}

int64_t BlockPool::free_pages() const {
  std::lock_guard lock(mutex_);
  return free_pages_;
}

void BlockPool::retain(PageRef::Slab* slab, int32_t index) {
  std::lock_guard lock(mutex_);
  slab->references[index]++;
}

void BlockPool::release(PageRef::Slab* slab, int32_t index) {
  std::lock_guard lock(mutex_);
  if (--slab->references[index] > 0) return;
  free_pages_++;
  if (--slab->used > 0) return;
  free_pages_ -= slab->n_pages();
  held_bytes_ -= slab->memory.bytes();
  slabs_.remove_if([&](const auto& held) { return held.get() == slab; });
}

}  // namespace mustafar
