// How large the next slab of a pool of pages is: most of a large store shall lie in huge pages,
// little be held that nobody asked for, and one page in use keep little from being returned.
#pragma once

#include <cstdint>

namespace mustafar {

int64_t slab_bytes(int64_t page_bytes, int64_t n_pages);  // with kSlabSlack

// Pages of the first of the slabs to take for `missing` (>= 1) pages by a pool that holds
// held_bytes, all in use. Either small: about small_bytes, at least one page and at most 64. Or as
// many pages as cover whole huge pages:
//   - of what is asked for, or of a sixteenth of what is held where that is more,
//   - but at most of an eighth of what will be held, and 16 MB (or one huge page);
//   - it exceeds what is asked for by an eighth of what is then in use at most.
int64_t next_slab_pages(int64_t page_bytes, int64_t small_bytes, int64_t held_bytes,
                        int64_t missing);

}  // namespace mustafar
