#include "kv/slab_size.h"

#include <algorithm>

#include "core/buffer.h"
#include "format/block_format.h"

namespace mustafar {
namespace {

constexpr int64_t kHugePage = HostBuffer::kHugePage;
constexpr int64_t kLargestSlab = 8 * kHugePage;

int64_t whole_huge_pages(int64_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

}  // namespace

int64_t slab_bytes(int64_t page_bytes, int64_t n_pages) {
  return n_pages * page_bytes + kSlabSlack;
}

int64_t next_slab_pages(int64_t page_bytes, int64_t small_bytes, int64_t held_bytes,
                        int64_t missing) {
  const int64_t small = std::clamp<int64_t>(small_bytes / page_bytes, 1, 64);
  const int64_t asked = missing * page_bytes;
  const int64_t eighth = (held_bytes + asked) / 8;
  const int64_t largest = std::clamp(eighth / kHugePage * kHugePage, kHugePage, kLargestSlab);
  int64_t bytes = std::min(whole_huge_pages(std::max(asked, held_bytes / 16)), largest);
  for (; bytes > small * page_bytes; bytes -= kHugePage) {
    // Only a whole huge page is one to the system, so a page more covers the last one's end; what
    // it has beyond that, and the slack behind pages that fit exactly, lies in small pages.
    const int64_t n_pages = (bytes + page_bytes - 1) / page_bytes;
    if (slab_bytes(page_bytes, n_pages) - asked <= eighth) return n_pages;
  }
  return small;
}

}  // namespace mustafar
