#include "kv/slab_size.h"

#include <algorithm>

#include "core/buffer.h"
#include "format/block_format.h"

namespace mustafar {
namespace {

constexpr int64_t kHugePage = HostBuffer::kHugePage;
constexpr int64_t kLargestSlab = 8 * kHugePage;
constexpr int64_t kMostSmallPages = 64;  // of a slab that is not made of huge pages
// One part in so many of what a pool holds: as much may be held ahead of its need, and by as much
// it grows at least.
constexpr int64_t kAheadShare = 8;
constexpr int64_t kGrowthShare = 16;

int64_t whole_huge_pages(int64_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

}  // namespace

int64_t slab_bytes(int64_t page_bytes, int64_t n_pages) {
  return n_pages * page_bytes + kSlabSlack;
}

int64_t next_slab_pages(int64_t page_bytes, int64_t small_bytes, int64_t held_bytes,
                        int64_t missing) {
  const int64_t small = std::clamp<int64_t>(small_bytes / page_bytes, 1, kMostSmallPages);
  const int64_t asked = missing * page_bytes;
  const int64_t ahead = (held_bytes + asked) / kAheadShare;
  const int64_t largest = std::clamp(ahead / kHugePage * kHugePage, kHugePage, kLargestSlab);
  int64_t bytes = std::min(whole_huge_pages(std::max(asked, held_bytes / kGrowthShare)), largest);
  for (; bytes > small * page_bytes; bytes -= kHugePage) {
    // The system makes huge pages of whole ones alone, so the last of our pages may reach beyond
    // the end of the last huge page. What lies there, and the slack behind it, is in small pages.
    const int64_t n_pages = (bytes + page_bytes - 1) / page_bytes;
    if (slab_bytes(page_bytes, n_pages) - asked <= ahead) return n_pages;
  }
  return small;
}

}  // namespace mustafar
