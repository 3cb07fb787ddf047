// Device memory that is kept for its next use, over the fake runtime.
#include "cuda/memory_pool.h"

#include <gtest/gtest.h>

#include "fake_runtime.h"
#include "mustafar/error.h"

namespace mustafar::cuda {
namespace {

using fake_cuda::runtime;

class MemoryPoolTest : public ::testing::Test {
 protected:
  void SetUp() override { fake_cuda::reset(); }
  void TearDown() override { EXPECT_TRUE(runtime().nothing_is_left()); }
};

TEST_F(MemoryPoolTest, GivesMemoryOfTheSameSizeAgain) {
  MemoryPool pool(1000);
  void* const first = pool.take(300);
  pool.give(first, 300);
  EXPECT_EQ(pool.kept(), 300);
  void* const other = pool.take(301);
  EXPECT_EQ(runtime().count("cudaMalloc"), 2);
  EXPECT_EQ(pool.take(300), first);
  EXPECT_EQ(pool.kept(), 0);
  EXPECT_EQ(runtime().count("cudaMalloc"), 2);
  pool.give(first, 300);
  pool.give(other, 301);
  EXPECT_EQ(pool.kept(), 601);
  EXPECT_EQ(runtime().used_bytes(), 601);
}

TEST_F(MemoryPoolTest, KeepsNoMoreThanItMay) {
  MemoryPool pool(500);
  void* const first = pool.take(300);
  void* const second = pool.take(300);
  pool.give(first, 300);
  pool.give(second, 300);
  EXPECT_EQ(pool.kept(), 300);
  EXPECT_EQ(runtime().used_bytes(), 300);
}

TEST_F(MemoryPoolTest, GivesBackWhatItKeepsBeforeItRefuses) {
  MemoryPool pool(1000);
  runtime().memory_bytes = 1000;
  void* const first = pool.take(600);
  pool.give(first, 600);
  void* const second = pool.take(700);  // beside the first there is no room
  EXPECT_EQ(pool.kept(), 0);
  EXPECT_EQ(runtime().used_bytes(), 700);
  EXPECT_THROW(pool.take(400), OutOfMemory);
  pool.give(second, 700);
}

}  // namespace
}  // namespace mustafar::cuda
