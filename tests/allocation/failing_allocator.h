// Memory that runs out on command: the n-th allocation from now on fails, and with it every later
// HostBuffer (who is refused one may ask for a smaller); every later operator new where that is
// asked for.
#pragma once

#include <cstdint>

namespace mustafar::testing {

// Counts every operator new and every HostBuffer (aligned_alloc, wrapped by the linker) of the
// process; n: 1 is the next one.
void fail_allocation(int64_t n, bool and_all_later);
// Stops counting. Returns whether an allocation failed.
bool stop_failing();

}  // namespace mustafar::testing
