// The harness itself: what it computes, and that it catches the faults it is there to catch.
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

#include "cuda/async_copy.cuh"
#include "cuda/device_ops.cuh"
#include "cuda/matrix_ops.cuh"
#include "simt.h"

namespace mustafar::cuda {
namespace {

// Block-wide reversal through shared memory. kBarrier false plants a missing barrier.
template <bool kBarrier>
void reverse_kernel(const int* in, int* out) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  const int i = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  shared[i] = in[i];
  if (kBarrier) sync_block();
  out[i] = shared[n - 1 - i];
}

template <bool kBarrier>
int wrong_reversals() {
  std::vector<int> in(64), out(64);
  for (int i = 0; i < 64; i++) in[i] = i + 1;
  int wrong = 0;
  for (uint32_t seed = 0; seed < 8; seed++) {
    simt::set_seed(seed);
    simt::launch({}, {64}, 64 * 4, [&] { reverse_kernel<kBarrier>(in.data(), out.data()); });
    for (int i = 0; i < 64; i++) wrong += out[i] != in[63 - i];
  }
  return wrong;
}

TEST(SimtHarness, BarriersOrderSharedMemory) { EXPECT_EQ(wrong_reversals<true>(), 0); }
TEST(SimtHarness, MissingBarrierIsCaught) { EXPECT_GT(wrong_reversals<false>(), 0); }

TEST(SimtHarness, MissingWarpBarrierIsCaught) {
  const auto wrong = [](bool barrier) {
    int count = 0;
    for (uint32_t seed = 0; seed < 8; seed++) {
      simt::set_seed(seed);
      std::vector<int> out(32);
      simt::launch({}, {32}, 128, [&] {
        int* shared = reinterpret_cast<int*>(shared_memory());
        shared[lane_id()] = lane_id();
        if (barrier) sync_warp();
        out[lane_id()] = shared[lane_id() ^ 1];
      });
      for (int i = 0; i < 32; i++) count += out[i] != (i ^ 1);
    }
    return count;
  };
  EXPECT_EQ(wrong(true), 0);
  EXPECT_GT(wrong(false), 0);
}

TEST(SimtHarnessDeathTest, OutOfBoundsOfSharedMemoryIsCaught) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto write_at = [](int index) {
    simt::launch({}, {32}, 128 * 4, [&] {
      volatile int* shared = reinterpret_cast<int*>(shared_memory());
      if (lane_id() == 0) shared[index] = 1;
    });
  };
  write_at(127);
  EXPECT_DEATH(write_at(128), "out of bounds|AddressSanitizer");
  EXPECT_THROW(write_at(-1), simt::Error);
}

TEST(SimtHarnessDeathTest, OutOfBoundsOfDeviceMemoryIsCaught) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  simt::GuardedMemory memory(256);
  volatile int sink = 0;
  const auto read_at = [&](int index) {
    simt::launch({}, {32}, 0, [&] { sink = reinterpret_cast<int*>(memory.data())[index]; });
  };
  read_at(63);
  EXPECT_DEATH(read_at(64), "out of bounds|AddressSanitizer");
  reinterpret_cast<int*>(memory.data())[-1] = 0;
  EXPECT_THROW(memory.check("it"), simt::Error);
}

TEST(SimtHarness, DeadlockIsCaught) {
  EXPECT_THROW(simt::launch({}, {64}, 0,
                            [] {
                              if (threadIdx.x < 32) sync_block();
                            }),
               simt::Error);
  EXPECT_THROW(simt::launch({}, {32}, 0,
                            [] {
                              if (lane_id() < 31) sync_warp();
                            }),
               simt::Error);
  simt::launch({}, {64}, 0, [] { sync_block(); });  // the harness works again
}

TEST(SimtHarness, MixedCollectivesAreCaught) {
  EXPECT_THROW(simt::launch({}, {32}, 0,
                            [] {
                              if (lane_id() < 16) {
                                shuffle(1, 0);
                              } else {
                                ballot(true);
                              }
                            }),
               simt::Error);
}

TEST(SimtHarness, CopiesArriveWhenWaitedFor) {
  alignas(16) static uint32_t source[4] = {1, 2, 3, 4};
  const auto first_word = [](bool wait) {
    uint32_t seen = 0;
    simt::launch({}, {32}, 16, [&] {
      if (lane_id() == 0) cp_async16(shared_memory(), source);
      cp_async_commit();
      if (wait) cp_async_wait<0>();
      sync_warp();
      if (lane_id() == 1) std::memcpy(&seen, shared_memory(), 4);
      sync_warp();
      cp_async_wait<0>();
    });
    return seen;
  };
  EXPECT_EQ(first_word(true), 1u);
  EXPECT_EQ(first_word(false), 0xCDCDCDCDu);
  EXPECT_THROW(simt::launch({}, {32}, 16,
                            [] {
                              cp_async16(shared_memory() + 4, source);
                              cp_async_commit();
                              cp_async_wait<0>();
                            }),
               simt::Error);
}

TEST(SimtHarness, BitOperations) {
  EXPECT_EQ(byte_permute(0x33221100, 0x77665544, 0x7410), 0x77441100u);
  EXPECT_EQ(byte_permute(0x80, 0, 0x8888), 0xffffffffu);
  EXPECT_EQ(funnel_right(0x11223344, 0xaabbccdd, 8), 0xdd112233u);
  EXPECT_EQ(funnel_right(1, 2, 32), 2u);  // a shift by 32 is whole, not none
}

// D = A B with random small integers, fragments built from the documented layout. column_shift != 0
// plants a wrong fragment index.
template <typename Element, typename Acc, int kK>
int mma_errors(int column_shift) {
  std::mt19937 random(5);
  std::vector<int> a(16 * kK), b(kK * 8);
  for (int& x : a) x = static_cast<int>(random() % 15) - 7;
  for (int& x : b) x = static_cast<int>(random() % 15) - 7;
  std::vector<float> d(16 * 8);
  simt::launch({}, {32}, 0, [&] {
    const int g = lane_id() >> 2, c = lane_id() & 3, per_word = kK / 8;
    const auto word_of = [&](auto at) {
      uint32_t word = 0;
      for (int i = 0; i < per_word; i++) {
        const int x = at(i);
        word |= (per_word == 2 ? uint32_t{f32_to_f16(static_cast<float>(x))}
                               : static_cast<uint32_t>(x) & 255u)
                << (32 / per_word * i);
      }
      return word;
    };
    uint32_t fa[4], fb[2];
    for (int r = 0; r < 4; r++) {
      const int row = g + 8 * (r & 1), column = per_word * c + kK / 2 * (r >> 1);
      fa[r] = word_of([&](int i) { return a[row * kK + (column + i + column_shift) % kK]; });
    }
    for (int r = 0; r < 2; r++) {
      const int row = per_word * c + kK / 2 * r;
      fb[r] = word_of([&](int i) { return b[(row + i) * 8 + g]; });
    }
    Acc acc[4] = {};
    if constexpr (kK == 16) {
      mma_16x8x16<DType::kF16>(acc, fa, fb);
    } else {
      mma_16x8x32_s8(acc, fa, fb);
    }
    for (int i = 0; i < 4; i++) d[(g + 8 * (i >> 1)) * 8 + 2 * c + (i & 1)] = acc[i];
  });
  int errors = 0;
  for (int m = 0; m < 16; m++) {
    for (int n = 0; n < 8; n++) {
      int want = 0;
      for (int k = 0; k < kK; k++) want += a[m * kK + k] * b[k * 8 + n];
      errors += d[m * 8 + n] != static_cast<float>(want);
    }
  }
  return errors;
}

TEST(SimtHarness, MatrixProducts) {
  EXPECT_EQ((mma_errors<uint16_t, float, 16>(0)), 0);
  EXPECT_EQ((mma_errors<int8_t, int32_t, 32>(0)), 0);
}

TEST(SimtHarness, WrongFragmentIndexIsCaught) {
  EXPECT_GT((mma_errors<uint16_t, float, 16>(1)), 0);
  EXPECT_GT((mma_errors<int8_t, int32_t, 32>(4)), 0);
}

TEST(SimtHarness, MatrixLoadsAndTransposes) {
  std::vector<int> errors(1);
  simt::launch({}, {32}, 4 * 128, [&] {
    uint16_t* shared = reinterpret_cast<uint16_t*>(shared_memory());
    for (int i = lane_id(); i < 256; i += 32) shared[i] = static_cast<uint16_t>(i);
    sync_warp();
    const int g = lane_id() >> 2, c = lane_id() & 3;
    uint32_t rows[4], columns[4];
    load_matrices<false>(rows, shared + lane_id() * 8);
    load_matrices<true>(columns, shared + lane_id() * 8);
    for (uint32_t m = 0; m < 4; m++) {
      const uint32_t first = 64 * m + static_cast<uint32_t>(8 * g + 2 * c);
      errors[0] += rows[m] != (first | (first + 1) << 16);
      errors[0] += columns[m] != transpose_8x8(rows[m]);
      const uint32_t down = 64 * m + static_cast<uint32_t>(16 * c + g);
      errors[0] += columns[m] != (down | (down + 8) << 16);
    }
  });
  EXPECT_EQ(errors[0], 0);
}

}  // namespace
}  // namespace mustafar::cuda
