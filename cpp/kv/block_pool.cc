#include "kv/block_pool.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "mustafar/error.h"

namespace mustafar {
namespace {

// Small slabs on the host keep what is held close to what is used; device allocations are dear.
constexpr int64_t kHostSlabBytes = 256 << 10;
constexpr int64_t kDeviceSlabBytes = 32 << 20;

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

void KVBudget::take(int64_t bytes) {
  std::lock_guard lock(mutex_);
  if (limit_ != 0 && bytes > limit_ - used_) {
    throw OutOfMemory("the KV cache needs " + std::to_string(bytes) + " more bytes, but " +
                      std::to_string(used_) + " of kv_budget = " + std::to_string(limit_) +
                      " bytes are in use: raise kv_budget, raise sparsity or shorten the context");
  }
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
  int32_t used = 0;
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

BlockPool::BlockPool(Backend& backend, std::shared_ptr<KVBudget> budget, const StoreLayout& layout)
    : backend_(backend), budget_(std::move(budget)), layout_(layout) {
  const int64_t slab_bytes = backend.host_memory() ? kHostSlabBytes : kDeviceSlabBytes;
  pages_per_slab_ =
      static_cast<int32_t>(std::clamp<int64_t>(slab_bytes / layout_.page_bytes, 1, 64));
}

BlockPool::~BlockPool() = default;

std::vector<PageRef> BlockPool::allocate(int64_t n) {
  std::vector<PageRef> pages;
  pages.reserve(n);
  const std::shared_ptr<BlockPool> self = shared_from_this();
  // References are made under the lock; were one slab refused, dropping `pages` outside returns
  // all.
  std::unique_lock lock(mutex_);
  const auto take_from = [&](PageRef::Slab* slab) {
    for (int32_t i = 0; i < pages_per_slab_ && static_cast<int64_t>(pages.size()) < n; i++) {
      if (slab->references[i] != 0) continue;
      slab->references[i] = 1;
      slab->used++;
      free_pages_--;
      PageRef page;
      page.pool_ = self;
      page.slab_ = slab;
      page.index_ = i;
      page.data_ = static_cast<uint8_t*>(slab->memory.data()) + i * layout_.page_bytes;
      pages.push_back(std::move(page));
    }
  };
  if (free_pages_ > 0) {
    for (auto& slab : slabs_) {
      if (slab->used < pages_per_slab_) take_from(slab.get());
      if (static_cast<int64_t>(pages.size()) == n || free_pages_ == 0) break;
    }
  }
  while (static_cast<int64_t>(pages.size()) < n) {
    auto slab = std::make_unique<PageRef::Slab>();
    try {
      slab->references.assign(pages_per_slab_, 0);
      slab->memory = KVMemory(backend_, budget_, pages_per_slab_ * layout_.page_bytes + kSlabSlack);
    } catch (...) {
      lock.unlock();  // releasing the pages takes the lock
      pages.clear();
      throw;
    }
    slabs_.push_back(std::move(slab));
    free_pages_ += pages_per_slab_;
    take_from(slabs_.back().get());
  }
  return pages;
}

int64_t BlockPool::allocated_bytes() const {
  std::lock_guard lock(mutex_);
  int64_t bytes = 0;
  for (const auto& slab : slabs_) bytes += slab->memory.bytes();
  return bytes;
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
  free_pages_ -= pages_per_slab_;
  slabs_.remove_if([&](const auto& held) { return held.get() == slab; });
}

}  // namespace mustafar
