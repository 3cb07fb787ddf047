// Memory that runs out on command: the n-th allocation from now on fails, and with it every later
// HostBuffer (who is refused one may ask for a smaller), but no later operator new.
#pragma once

#include <cstdint>

namespace mustafar::testing {

// Counts every operator new and every HostBuffer (aligned_alloc, wrapped by the linker) of the
// process; n: 1 is the next one.
void fail_allocation(int64_t n);
// Stops counting. kSpared: it was reached, but it belongs to the destructor of a nlohmann::json,
// which allocates (3.11: to take nested values apart without recursion) and where nobody could
// catch the error; such an allocation does not fail here.
enum class Reached { kNo, kFailed, kSpared };
Reached stop_failing();

}  // namespace mustafar::testing
