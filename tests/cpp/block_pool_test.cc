#include "kv/block_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/buffer.h"
#include "mustafar/error.h"
#include "support/stub_backend.h"

namespace mustafar {
namespace {

// Memory and nothing else; counts what it gave, and may refuse large pieces.
class MemoryBackend final : public testing::StubBackend {
 public:
  bool host_memory() const override { return is_host; }

  std::unique_ptr<DeviceMemory> allocate(int64_t bytes) override {
    if (bytes > largest || n_left == 0) throw OutOfMemory("refused");
    n_left--;
    n_allocations++;
    return std::make_unique<Piece>(*this, bytes);
  }
  int64_t available_bytes() const override { return largest; }

  bool is_host = true;
  int64_t largest = std::numeric_limits<int64_t>::max();
  int n_left = std::numeric_limits<int>::max();  // allocations until all are refused
  int64_t held = 0;
  int n_allocations = 0;

 private:
  class Piece final : public DeviceMemory {
   public:
    Piece(MemoryBackend& backend, int64_t bytes) : backend_(backend), buffer_(bytes) {
      data_ = buffer_.data();
      bytes_ = bytes;
      backend_.held += bytes;
    }
    ~Piece() override { backend_.held -= bytes_; }

   private:
    MemoryBackend& backend_;
    HostBuffer buffer_;
  };
};

class BlockPoolTest : public ::testing::Test {
 protected:
  static constexpr int64_t kPage = 61440;  // bytes
  static constexpr int64_t kHuge = HostBuffer::kHugePage;
  static constexpr int64_t kLargeSlab = 35 * kPage + kSlabSlack;  // one huge page is in it

  void make(int64_t limit = 0, int64_t page_bytes = kPage) {
    budget_ = std::make_shared<KVBudget>(limit);
    pool_ = std::make_shared<BlockPool>(backend_, budget_, page_bytes);
  }
  ~BlockPoolTest() override {
    pool_.reset();
    EXPECT_EQ(backend_.held, 0);
    EXPECT_EQ(budget_->used(), 0);
  }

  // The numbers that a user sees are those of the allocator.
  void expect_true() const {
    EXPECT_EQ(pool_->allocated_bytes(), backend_.held);
    EXPECT_EQ(budget_->used(), backend_.held);
  }

  MemoryBackend backend_;
  std::shared_ptr<KVBudget> budget_;
  std::shared_ptr<BlockPool> pool_;
};

TEST_F(BlockPoolTest, PagesAreDistinctAndSlackIsReadable) {
  make();
  std::vector<PageRef> pages;
  for (const int64_t n : {1, 5, 400, 1, 1}) {
    for (PageRef& page : pool_->allocate(n)) pages.push_back(std::move(page));
    expect_true();
  }
  for (size_t i = 0; i < pages.size(); i++) {
    std::memset(pages[i].data(), static_cast<int>(i % 251), kPage + kSlabSlack);
  }
  for (size_t i = 0; i < pages.size(); i++) {
    std::memset(pages[i].data(), static_cast<int>(i % 251), kPage);
  }
  for (size_t i = 0; i < pages.size(); i++) {
    EXPECT_EQ(pages[i].data()[0], i % 251);
    EXPECT_EQ(pages[i].data()[kPage - 1], i % 251);
  }
}

TEST_F(BlockPoolTest, ALargePromptLiesInHugePages) {
  make();
  const std::vector<PageRef> pages = pool_->allocate(256);
  int64_t aligned = 0;
  for (const PageRef& page : pages)
    aligned += reinterpret_cast<uintptr_t>(page.data()) % kHuge == 0;
  EXPECT_EQ(aligned, 8);
  EXPECT_EQ(backend_.n_allocations, 8);
  EXPECT_EQ(backend_.held, 8 * kLargeSlab);
}

TEST_F(BlockPoolTest, ASmallPromptHoldsSmallSlabs) {
  make();
  const std::vector<PageRef> pages = pool_->allocate(9);
  EXPECT_EQ(backend_.held, 3 * (4 * kPage + kSlabSlack));
  EXPECT_EQ(pool_->free_pages(), 3);
}

TEST_F(BlockPoolTest, SharedPagesStayUntilTheLastReference) {
  make();
  std::vector<PageRef> pages = pool_->allocate(256);
  std::vector<PageRef> fork(pages.begin(), pages.begin() + 100);
  const int64_t held = backend_.held;
  pages.resize(100);  // a rewind: every slab behind the one of page 100 is returned
  EXPECT_EQ(backend_.held, 3 * kLargeSlab);
  EXPECT_LT(backend_.held, held);
  const int64_t shared = backend_.held;
  pages.clear();
  EXPECT_EQ(backend_.held, shared);
  expect_true();
  fork.clear();
  EXPECT_EQ(backend_.held, 0);
  EXPECT_EQ(pool_->free_pages(), 0);
}

// The danger of large slabs: one page in use keeps one from being returned.
TEST_F(BlockPoolTest, OnePageKeepsLittle) {
  make();
  for (const int64_t n : {64, 256, 1024, 4096}) {
    std::vector<PageRef> pages = pool_->allocate(n);
    const int64_t all = backend_.held;
    pages.erase(pages.begin() + 1, pages.end());
    EXPECT_LE(backend_.held, std::max(kLargeSlab, all / 8 + kPage)) << n;
    EXPECT_LE(backend_.held, 8 * kHuge + kPage) << n;
  }
}

TEST_F(BlockPoolTest, TheFullestSlabGivesItsPagesFirst) {
  make();
  std::vector<PageRef> pages = pool_->allocate(256);
  // Of the first slab one page stays, of the third all but three.
  std::vector<PageRef> kept = {pages[5]};
  kept.insert(kept.end(), pages.begin() + 70, pages.begin() + 70 + 32);
  const uint8_t* const full = pages[70].data();
  pages.clear();
  ASSERT_EQ(backend_.held, 2 * kLargeSlab);
  for (PageRef& page : pool_->allocate(3)) {
    EXPECT_GE(page.data(), full);
    EXPECT_LT(page.data(), full + kLargeSlab);
    kept.push_back(std::move(page));
  }
  kept.erase(kept.begin());
  EXPECT_EQ(backend_.held, kLargeSlab);
  expect_true();
}

// Sequences grow in turns, so that every slab holds pages of several; most end, the others go on.
TEST_F(BlockPoolTest, WhatEndedSequencesLeaveIsUsedAndDrains) {
  make();
  std::mt19937 random(7);
  std::vector<std::vector<PageRef>> sequences(8);
  const auto used = [&] {
    int64_t n = 0;
    for (const auto& sequence : sequences) n += static_cast<int64_t>(sequence.size());
    return n;
  };
  for (int i = 0; i < 160; i++) {
    for (auto& sequence : sequences) sequence.push_back(pool_->allocate(1)[0]);
  }
  const auto expect_dense = [&] { EXPECT_LE(backend_.held, used() * kPage * 9 / 8 + (256 << 10)); };
  expect_dense();
  for (size_t i = 2; i < 8; i++) sequences[i].clear();

  // What is left grows to its fourfold, first in the room there is.
  const int n_allocations = backend_.n_allocations;
  const int64_t room = pool_->free_pages();
  EXPECT_GT(room, 800);
  for (int64_t i = 0; i < room; i++) sequences[i % 2].push_back(pool_->allocate(1)[0]);
  EXPECT_EQ(backend_.n_allocations, n_allocations);
  while (used() < 1280) sequences[0].push_back(pool_->allocate(1)[0]);
  expect_dense();

  // Sequences come and go; what their pages are scattered over fills up again.
  for (int round = 0; round < 4000; round++) {
    auto& sequence = sequences[random() % sequences.size()];
    if (random() % 100 < 60 && used() < 1280) {
      for (PageRef& page : pool_->allocate(1 + random() % 12)) sequence.push_back(std::move(page));
    } else {
      sequence.resize(sequence.size() * (random() % 100) / 100);
    }
    expect_true();
  }
  while (used() < 1280) sequences[0].push_back(pool_->allocate(1)[0]);
  expect_dense();
}

TEST_F(BlockPoolTest, ABudgetIsUsedToItsLastPage) {
  for (const int64_t n : {1, 7, 60, 700}) {
    for (const int64_t step : {1, 5}) {
      const int64_t limit = n * (kPage + kSlabSlack);  // were every slab one page
      make(limit);
      std::vector<PageRef> pages;
      while (static_cast<int64_t>(pages.size()) < n) {
        const int64_t missing = std::min(step, n - static_cast<int64_t>(pages.size()));
        for (PageRef& page : pool_->allocate(missing)) pages.push_back(std::move(page));
        EXPECT_LE(budget_->peak(), limit);
      }
      const int64_t held = backend_.held;
      EXPECT_EQ(pool_->free_pages(), 0);
      try {
        pool_->allocate(2);
        FAIL() << "beyond the budget";
      } catch (const OutOfMemory& error) {
        const std::string message = error.what();
        EXPECT_NE(message.find("kv_budget = " + std::to_string(limit)), std::string::npos);
        EXPECT_NE(message.find(std::to_string(2 * kPage + kSlabSlack)), std::string::npos);
        EXPECT_NE(message.find(std::to_string(held)), std::string::npos);
      }
      EXPECT_EQ(backend_.held, held);
      expect_true();
      pages.clear();
      EXPECT_EQ(backend_.held, 0);
    }
  }
}

TEST_F(BlockPoolTest, APromptBeyondTheBudgetTakesNothing) {
  make(100 * kPage);
  const std::vector<PageRef> some = pool_->allocate(10);
  const int64_t held = backend_.held, free_pages = pool_->free_pages();
  const int n_allocations = backend_.n_allocations;
  try {
    pool_->allocate(100 + free_pages);
    FAIL() << "beyond the budget";
  } catch (const OutOfMemory& error) {  // the whole need, not that of a slab
    EXPECT_NE(std::string(error.what()).find(std::to_string(100 * kPage + kSlabSlack)),
              std::string::npos);
  }
  EXPECT_EQ(backend_.n_allocations, n_allocations);
  EXPECT_EQ(backend_.held, held);
  EXPECT_EQ(pool_->free_pages(), free_pages);
}

TEST_F(BlockPoolTest, WhatIsHeldAheadLeavesABudgetsLastEighth) {
  const int64_t limit = int64_t{64} << 20;
  make(limit);
  std::vector<PageRef> pages;
  while (backend_.held < limit * 7 / 8) pages.push_back(pool_->allocate(1)[0]);
  EXPECT_LE(backend_.held, limit * 7 / 8 + kPage + kSlabSlack);
  EXPECT_EQ(pool_->free_pages(), 0);
  pages.push_back(pool_->allocate(1)[0]);
  EXPECT_EQ(pool_->free_pages(), 0);
}

TEST_F(BlockPoolTest, ADeviceWithoutLargePiecesGivesSmallOnes) {
  make();
  backend_.largest = 3 * kPage;  // two pages
  std::vector<PageRef> pages = pool_->allocate(100);
  EXPECT_EQ(pages.size(), 100u);
  expect_true();
  backend_.largest = kPage;  // none
  EXPECT_THROW(pool_->allocate(3), OutOfMemory);
  expect_true();
  pages.clear();
  EXPECT_EQ(backend_.held, 0);
}

TEST_F(BlockPoolTest, ADeviceIsSeldomAsked) {
  backend_.is_host = false;
  make();
  std::vector<PageRef> pages = pool_->allocate(1);
  EXPECT_EQ(pool_->free_pages(), 63);
  for (int i = 1; i < 2048; i++) pages.push_back(pool_->allocate(1)[0]);
  EXPECT_LE(backend_.n_allocations, 2048 / 64);
  EXPECT_LE(backend_.held, 2048 * kPage * 9 / 8);
}

TEST_F(BlockPoolTest, ARefusalHalfWayReturnsWhatWasTaken) {
  make();
  const std::vector<PageRef> some = pool_->allocate(3);
  const int64_t held = backend_.held, free_pages = pool_->free_pages();
  backend_.n_left = 3;
  EXPECT_THROW(pool_->allocate(256), OutOfMemory);
  EXPECT_EQ(backend_.n_left, 0);
  EXPECT_EQ(backend_.held, held);
  EXPECT_EQ(pool_->free_pages(), free_pages);
  expect_true();
}

}  // namespace
}  // namespace mustafar
