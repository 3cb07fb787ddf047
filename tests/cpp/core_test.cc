#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "core/buffer.h"
#include "core/dtype.h"
#include "core/thread_pool.h"

namespace mustafar {
namespace {

TEST(DTypeTest, EveryHalfRoundTrips) {
  for (uint32_t h = 0; h < 0x10000; h++) {
    const float f16 = f16_to_f32(static_cast<uint16_t>(h));
    if (!std::isnan(f16)) {
      EXPECT_EQ(f32_to_f16(f16), h);
    }
    const float bf16 = bf16_to_f32(static_cast<uint16_t>(h));
    if (!std::isnan(bf16)) {
      EXPECT_EQ(f32_to_bf16(bf16), h);
    }
  }
}

TEST(DTypeTest, RoundsToNearestEven) {
  for (uint32_t h = 0; h < 0x7bff; h++) {  // neighbours of every finite half, and their midpoint
    const float low = f16_to_f32(static_cast<uint16_t>(h));
    const float high = f16_to_f32(static_cast<uint16_t>(h + 1));
    const float middle = (low + high) / 2;
    EXPECT_EQ(f32_to_f16(middle), (h & 1) ? h + 1 : h);
    EXPECT_EQ(f32_to_f16(std::nextafter(middle, high)), h + 1);
    EXPECT_EQ(f32_to_f16(std::nextafter(middle, low)), h);
  }
  EXPECT_EQ(f32_to_f16(65519.996f), 0x7bff);
  EXPECT_EQ(f32_to_f16(65520.0f), 0x7c00);
  EXPECT_TRUE(std::isnan(f16_to_f32(f32_to_f16(std::numeric_limits<float>::quiet_NaN()))));
  EXPECT_TRUE(std::isnan(bf16_to_f32(f32_to_bf16(std::numeric_limits<float>::quiet_NaN()))));
}

TEST(HostBufferTest, IsAlignedAndLargeOnesToHugePages) {
  constexpr size_t kHuge = HostBuffer::kHugePage;
  for (const size_t bytes :
       {size_t{1}, size_t{4097}, kHuge - 1, kHuge, kHuge + 64, 5 * kHuge + 1}) {
    HostBuffer buffer(bytes);
    const size_t alignment = bytes < kHuge ? HostBuffer::kAlignment : kHuge;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % alignment, 0u) << bytes;
    EXPECT_EQ(buffer.bytes(), bytes);
    buffer.as<uint8_t>()[0] = buffer.as<uint8_t>()[bytes - 1] = 1;
  }
  EXPECT_EQ(HostBuffer().data(), nullptr);
}

// Linux marks what huge pages were asked for with "hg".
TEST(HostBufferTest, AsksForHugePages) {
  std::ifstream smaps("/proc/self/smaps");
  if (!smaps || !std::ifstream("/sys/kernel/mm/transparent_hugepage/enabled")) {
    GTEST_SKIP() << "no transparent huge pages here";
  }
  HostBuffer buffer(HostBuffer::kHugePage + 64);
  const uintptr_t address = reinterpret_cast<uintptr_t>(buffer.data());
  smaps = std::ifstream("/proc/self/smaps");
  bool inside = false;
  for (std::string line; std::getline(smaps, line);) {
    uintptr_t begin = 0, end = 0;
    if (std::sscanf(line.c_str(), "%zx-%zx ", &begin, &end) == 2) {
      inside = begin <= address && address < end;
    } else if (inside && line.starts_with("VmFlags:")) {
      EXPECT_NE(line.find(" hg"), std::string::npos) << line;
      return;
    }
  }
  FAIL() << "no mapping holds the buffer";
}

TEST(ThreadPoolTest, RunsEveryIterationOnce) {
  ThreadPool pool(4);
  for (int64_t n : {0, 1, 2, 3, 7, 1000}) {
    std::vector<std::atomic<int>> hits(n);
    pool.parallel_for(n, [&](int64_t i, int worker) {
      EXPECT_GE(worker, 0);
      EXPECT_LT(worker, pool.size());
      hits[i]++;
    });
    for (auto& hit : hits) {
      EXPECT_EQ(hit, 1);
    }
  }
}

TEST(ThreadPoolTest, RethrowsAndStaysUsable) {
  ThreadPool pool(3);
  for (int round = 0; round < 20; round++) {
    EXPECT_THROW(pool.parallel_for(50,
                                   [&](int64_t i, int) {
                                     if (i == 13) throw std::runtime_error("planted");
                                   }),
                 std::runtime_error);
    std::atomic<int64_t> sum{0};
    pool.parallel_for(100, [&](int64_t i, int) { sum += i; });
    EXPECT_EQ(sum, 4950);
  }
}

TEST(ThreadPoolTest, SeveralCallersShareOnePool) {
  ThreadPool pool(2);
  std::vector<std::thread> callers;
  std::atomic<int64_t> total{0};
  for (int c = 0; c < 4; c++) {
    callers.emplace_back([&] {
      for (int r = 0; r < 200; r++) pool.parallel_for(10, [&](int64_t i, int) { total += i; });
    });
  }
  for (auto& caller : callers) caller.join();
  EXPECT_EQ(total, 4 * 200 * 45);
}

}  // namespace
}  // namespace mustafar
