// What the machine can do at best: the yardstick of a benchmark.
#pragma once

#include <cstdint>
#include <string>

namespace mustafar::cli {

int64_t last_level_cache_bytes();
std::string cpu_name();

// Bytes per second that this many threads read from memory together: the best of several passes
// over a buffer four times as large as the last-level cache.
double measure_read_bandwidth(int threads);

}  // namespace mustafar::cli
