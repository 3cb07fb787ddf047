#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include "core/buffer.h"
#include "core/dtype.h"

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

}  // namespace
}  // namespace mustafar
