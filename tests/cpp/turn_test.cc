#include "core/turn.h"

#include <gtest/gtest.h>

namespace mustafar {
namespace {

using std::chrono::microseconds;

constexpr Turn::Time kStart{std::chrono::hours(1)};
constexpr auto kMoment = microseconds(2);  // a yield on a core that nobody else wants

TEST(TurnTest, EndsWithAYieldAfterItsLength) {
  Turn turn(kStart);
  EXPECT_EQ(turn.next(kStart), Turn::Next::kGoOn);
  EXPECT_EQ(turn.next(kStart + Turn::kLength - kMoment), Turn::Next::kGoOn);
  EXPECT_EQ(turn.next(kStart + Turn::kLength), Turn::Next::kYield);
}

TEST(TurnTest, OnACoreOfItsOwnNeverRests) {
  Turn turn(kStart);
  auto now = kStart;
  for (int i = 0; i < 1000; i++) {
    now += Turn::kLength + microseconds(i % 100);
    ASSERT_EQ(turn.next(now), Turn::Next::kYield) << i;
    turn.begin_after_yield(now, now + kMoment);
    now += kMoment;
    ASSERT_EQ(turn.next(now), Turn::Next::kGoOn) << i;
  }
}

TEST(TurnTest, ShortInterruptionsAreNoNeighbour) {
  Turn turn(kStart);
  const auto yielded = kStart + Turn::kLength;
  const auto back = yielded + Turn::kSlice - kMoment;
  turn.begin_after_yield(yielded, back);
  EXPECT_EQ(turn.next(back + Turn::kLength), Turn::Next::kYield);
}

TEST(TurnTest, RestsWhileItsCoreIsShared) {
  Turn turn(kStart);
  const auto yielded = kStart + Turn::kLength;
  const auto back = yielded + Turn::kSlice;
  turn.begin_after_yield(yielded, back);
  auto now = back;
  int rests = 0;
  while (now + Turn::kLength < back + Turn::kShared) {
    ASSERT_EQ(turn.next(now), Turn::Next::kGoOn);
    now += Turn::kLength;
    ASSERT_EQ(turn.next(now), Turn::Next::kRest);
    now += Turn::kRest;
    turn.begin(now);
    rests++;
  }
  EXPECT_EQ(rests, Turn::kShared / (Turn::kLength + Turn::kRest));
  // Then it asks again, and has the core to itself if the neighbour is gone.
  now += Turn::kLength;
  ASSERT_EQ(turn.next(now), Turn::Next::kYield);
  turn.begin_after_yield(now, now + kMoment);
  EXPECT_EQ(turn.next(now + kMoment + Turn::kLength), Turn::Next::kYield);
}

TEST(TurnTest, SleepBeginsAnother) {
  Turn turn(kStart);
  const auto woken = kStart + 10 * Turn::kLength;
  turn.begin(woken);
  EXPECT_EQ(turn.next(woken + Turn::kLength - kMoment), Turn::Next::kGoOn);
  EXPECT_EQ(turn.next(woken + Turn::kLength), Turn::Next::kYield);
}

}  // namespace
}  // namespace mustafar
