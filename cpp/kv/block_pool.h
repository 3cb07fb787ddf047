// Pages of compressed blocks. A pool serves all sequences of a model whose pages have one size;
// a budget bounds what all pools and dense buffers of a model take together.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "core/fork.h"

namespace mustafar {

// Bytes of KV cache that a model's sessions hold, against an optional limit. Thread-safe.
class KVBudget {
 public:
  explicit KVBudget(int64_t limit_bytes) : limit_(limit_bytes) {}
  int64_t limit() const { return limit_; }
  int64_t used() const;
  int64_t peak() const;       // the most that was ever in use
  int64_t available() const;  // INT64_MAX without a limit
  // Both throw OutOfMemory naming the option, the need and the budget.
  void check(int64_t bytes) const;  // that they could be taken now
  void take(int64_t bytes);
  void give(int64_t bytes);

 private:
  void check_locked(int64_t bytes) const;

  const int64_t limit_;  // 0: none
  mutable ForkSafeMutex mutex_;
  int64_t used_ = 0;
  int64_t peak_ = 0;
};

// Device memory that counts in a budget from its allocation to its release.
class KVMemory {
 public:
  KVMemory() = default;
  KVMemory(Backend& backend, std::shared_ptr<KVBudget> budget, int64_t bytes);
  ~KVMemory();
  KVMemory(KVMemory&& other) noexcept;
  KVMemory& operator=(KVMemory&& other) noexcept;

  void* data() const { return memory_ ? memory_->data() : nullptr; }
  int64_t bytes() const { return memory_ ? memory_->bytes() : 0; }

 private:
  std::shared_ptr<KVBudget> budget_;
  std::unique_ptr<DeviceMemory> memory_;
};

class BlockPool;

// One reference to a page; copying shares the page. A page is immutable once it holds a block.
class PageRef {
 public:
  PageRef() = default;
  PageRef(const PageRef& other);
  PageRef(PageRef&& other) noexcept;
  PageRef& operator=(PageRef other) noexcept;
  ~PageRef();
  uint8_t* data() const { return data_; }

 private:
  friend class BlockPool;
  struct Slab;
  std::shared_ptr<BlockPool> pool_;
  Slab* slab_ = nullptr;
  int32_t index_ = 0;
  uint8_t* data_ = nullptr;
};

// Thread-safe. Slabs are taken from the backend as pages are needed, of a size that grows with what
// the pool holds (slab_size.h), and returned once none of their pages is in use, so that what is
// held follows the contexts. A page comes from the fullest slab that has one: the emptier ones
// drain.
class BlockPool : public std::enable_shared_from_this<BlockPool> {
 public:
  BlockPool(Backend& backend, std::shared_ptr<KVBudget> budget, int64_t page_bytes);
  ~BlockPool();

  // Takes n pages or none: throws OutOfMemory with the pool unchanged. Where memory is short, no
  // page is held ahead of its need.
  std::vector<PageRef> allocate(int64_t n);
  // Bytes that would go back to the backend if these references, of pages of this pool, were
  // dropped.
  int64_t bytes_freed_by(std::span<const PageRef* const> references) const;
  int64_t page_bytes() const { return page_bytes_; }
  int64_t allocated_bytes() const;  // held from the backend
  int64_t free_pages() const;       // of those, not in use

 private:
  friend class PageRef;
  PageRef::Slab* fullest_slab();             // of those with a free page
  PageRef::Slab* add_slab(int64_t missing);  // for the first of so many pages
  void retain(PageRef::Slab* slab, int32_t index);
  void release(PageRef::Slab* slab, int32_t index);

  Backend& backend_;
  std::shared_ptr<KVBudget> budget_;
  const int64_t page_bytes_;
  const int64_t small_slab_bytes_;
  mutable ForkSafeMutex mutex_;
  std::list<std::unique_ptr<PageRef::Slab>> slabs_;
  int64_t held_bytes_ = 0;
  int64_t free_pages_ = 0;
};

}  // namespace mustafar
