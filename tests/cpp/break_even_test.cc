#include "cli/bench/break_even.h"

#include <gtest/gtest.h>

namespace mustafar::cli {
namespace {

TEST(BreakEvenTest, FitsALine) {
  const DepthFit exact = fit_depth({0, 100, 1000}, {50, 70, 250});  // 50 + 0.2 x
  EXPECT_NEAR(exact.base_ns, 50, 1e-9);
  EXPECT_NEAR(exact.ns_per_token, 0.2, 1e-12);
  // numpy.polyfit([0, 1, 2], [1, 2, 6], 1) = [2.5, 0.5]
  const DepthFit noisy = fit_depth({0, 1, 2}, {1, 2, 6});
  EXPECT_NEAR(noisy.base_ns, 0.5, 1e-12);
  EXPECT_NEAR(noisy.ns_per_token, 2.5, 1e-12);
  const DepthFit one_depth = fit_depth({8, 8}, {3, 5});
  EXPECT_EQ(one_depth.base_ns, 4);
  EXPECT_EQ(one_depth.ns_per_token, 0);
}

TEST(BreakEvenTest, FindsTheDepthWhereTheLinesCross) {
  const DepthFit dense = {1000, 2.0};
  EXPECT_DOUBLE_EQ(break_even_depth(dense, {1500, 1.0}), 500);
  EXPECT_EQ(break_even_depth(dense, {900, 1.0}), 0);    // always faster
  EXPECT_EQ(break_even_depth(dense, {1500, 2.0}), -1);  // never
  EXPECT_EQ(break_even_depth(dense, {900, 2.5}), -1);   // slower where it matters
}

}  // namespace
}  // namespace mustafar::cli
