#include "kv/slab_size.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "core/buffer.h"
#include "format/block_format.h"

namespace mustafar {
namespace {

constexpr int64_t kHuge = HostBuffer::kHugePage;
constexpr int64_t kSmall = 256 << 10;

// A pool whose pages stay in use.
struct GrowingPool {
  explicit GrowingPool(int64_t page) : page_bytes(page) {}

  void allocate(int64_t n) {
    used += n;
    while (pages < used) {
      const int64_t n_pages = next_slab_pages(page_bytes, kSmall, held, used - pages);
      slabs.push_back(slab_bytes(page_bytes, n_pages));
      pages += n_pages;
      held += slabs.back();
    }
  }

  int64_t ahead() const { return held - used * page_bytes; }
  double in_huge_pages() const {
    int64_t bytes = 0;
    for (const int64_t slab : slabs) bytes += slab / kHuge * kHuge;
    return static_cast<double>(bytes) / static_cast<double>(held);
  }

  int64_t page_bytes;
  int64_t used = 0;  // pages
  int64_t pages = 0;
  int64_t held = 0;            // bytes
  std::vector<int64_t> slabs;  // bytes
};

// From those of a model of a megabyte to those of one of 8 billion weights: small, powers of two
// and others, about a huge page and larger than it.
class SlabSizeTest : public ::testing::TestWithParam<int64_t> {};
INSTANTIATE_TEST_SUITE_P(PageBytes, SlabSizeTest,
                         ::testing::Values(20480, 61440, 98304, 130048, 262144, 1900544, kHuge,
                                           4 * kHuge));

TEST_P(SlabSizeTest, StoresWithoutAHugePageTakeSmallSlabs) {
  const int64_t page = GetParam();
  const int64_t small = std::max<int64_t>(1, kSmall / page);
  EXPECT_EQ(next_slab_pages(page, kSmall, 0, 1), small);
  for (int64_t held = 0; held + 2 * page <= kHuge / 2; held += page) {
    EXPECT_EQ(next_slab_pages(page, kSmall, held, 2), small) << held;
  }
  EXPECT_EQ(next_slab_pages(page / 4096, kSmall, 0, 1), 64);
}

TEST_P(SlabSizeTest, HoldsLittleAheadOfItsNeed) {
  for (const int64_t step : {1, 3, 40}) {
    GrowingPool pool(GetParam());
    while (pool.held < int64_t{600} << 20) {
      const size_t before = pool.slabs.size();
      pool.allocate(step);
      EXPECT_LE(pool.ahead(), pool.used * pool.page_bytes / 8 + kSmall +
                                  static_cast<int64_t>(pool.slabs.size()) * kSlabSlack);
      for (size_t i = before; i < pool.slabs.size(); i++) {
        // What one page can keep from being returned.
        EXPECT_LE(pool.slabs[i],
                  std::clamp(pool.held / 8, kHuge, 8 * kHuge) + pool.page_bytes + kSlabSlack);
      }
    }
  }
}

TEST_P(SlabSizeTest, LargeStoresLieInHugePages) {
  GrowingPool prompt(GetParam()), decode(GetParam());
  prompt.allocate(std::max<int64_t>((int64_t{16} << 20) / GetParam(), 40));
  EXPECT_GE(prompt.in_huge_pages(), 0.85);
  while (decode.held < int64_t{512} << 20) decode.allocate(1);
  EXPECT_GE(decode.in_huge_pages(), 0.85);
  EXPECT_LE(decode.slabs.size(), std::max<size_t>(120, decode.pages));
}

}  // namespace
}  // namespace mustafar
