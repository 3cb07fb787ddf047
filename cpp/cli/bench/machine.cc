#include "cli/bench/machine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <fstream>
#include <vector>

#include "core/buffer.h"
#include "core/thread_pool.h"

namespace mustafar::cli {
namespace {

constexpr int64_t kChunkWords = 1 << 17;  // 1 MiB

uint64_t sum_words(const uint64_t* words, int64_t n) {
  constexpr int kLanes = 16;
  uint64_t lanes[kLanes] = {};
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
    __builtin_prefetch(words + i + 512);
    for (int j = 0; j < kLanes; j++) lanes[j] += words[i + j];
  }
  uint64_t sum = 0;
  for (const uint64_t lane : lanes) sum += lane;
  return sum;
}

}  // namespace

// What the C library derives (sysconf) is several times too much on some virtual machines; the
// kernel states what one core sees.
int64_t last_level_cache_bytes() {
  for (const char* level : {"3", "2"}) {
    std::ifstream file(std::string("/sys/devices/system/cpu/cpu0/cache/index") + level + "/size");
    int64_t kib = 0;
    if (file >> kib && kib > 0) return kib * 1024;  // e.g. 32768K
  }
  constexpr int64_t kUnknown = int64_t{32} << 20;
  return kUnknown;
}

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line)) {
    const size_t colon = line.find(": ");
    if (colon != std::string::npos && line.rfind("model name", 0) == 0) {
      return line.substr(colon + 2);
    }
  }
  return "unknown";
}

double measure_read_bandwidth(int threads) {
  using Clock = std::chrono::steady_clock;
  constexpr int kPasses = 7;
  const int64_t chunk_bytes = kChunkWords * 8;
  const int64_t bytes = std::max<int64_t>(4 * last_level_cache_bytes(), int64_t{256} << 20);
  const int64_t n_chunks = bytes / chunk_bytes;
  ThreadPool pool(threads);
  HostBuffer buffer(n_chunks * chunk_bytes);
  uint64_t* words = buffer.as<uint64_t>();
  pool.parallel_for(n_chunks, [&](int64_t chunk, int) {
    std::fill_n(words + chunk * kChunkWords, kChunkWords, static_cast<uint64_t>(chunk));
  });
  std::atomic<uint64_t> total{0};  // keeps the reads from being dropped
  double best = 0;
  for (int pass = 0; pass < kPasses; pass++) {
    const auto start = Clock::now();
    pool.parallel_for(n_chunks, [&](int64_t chunk, int) {
      total += sum_words(words + chunk * kChunkWords, kChunkWords);
    });
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    best = std::max(best, static_cast<double>(n_chunks * chunk_bytes) / seconds);
  }
  return total == 0 ? 0 : best;
}

}  // namespace mustafar::cli
