#include "core/thread_pool.h"

#include <gtest/gtest.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "core/available_cores.h"
#include "support/model_folder.h"

namespace mustafar {
namespace {

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

TEST(ThreadPoolTest, EveryIterationMayThrow) {
  ThreadPool pool(4);
  for (int round = 0; round < 200; round++) {
    EXPECT_THROW(pool.parallel_for(8, [](int64_t, int) { throw std::runtime_error("planted"); }),
                 std::runtime_error);
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

// One iteration lasts until all others have ended.
void check_others_go_on(int threads) {
  ThreadPool pool(threads);
  std::atomic<int> others{0};
  pool.parallel_for(50, [&](int64_t i, int) {
    if (i > 0) {
      others++;
      return;
    }
    while (others < 49) std::this_thread::yield();
  });
  EXPECT_EQ(others, 49);
}

TEST(ThreadPoolTest, OthersGoOnBesideALongIteration) { check_others_go_on(3); }

// Regions so short that most workers come when theirs is over: what they find is the next one,
// whole, or nothing.
TEST(ThreadPoolTest, LateWorkersTakeIterationsOfTheRegionThatRuns) {
  ThreadPool pool(8);
  for (int64_t round = 0; round < 20000; round++) {
    const int64_t n = 2 + round % 3;
    std::atomic<int64_t> sum{0};
    pool.parallel_for(n, [&sum, round](int64_t i, int) { sum += round + i; });
    ASSERT_EQ(sum, n * round + n * (n - 1) / 2) << round;
  }
}

// The cores that the calling thread may run on.
cpu_set_t allowed_cores() {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  EXPECT_EQ(sched_getaffinity(0, sizeof(cores), &cores), 0);
  return cores;
}

// Which threads that are started meanwhile inherit.
class OnOneCore {
 public:
  OnOneCore() : before_(allowed_cores()) {
    cpu_set_t one;
    CPU_ZERO(&one);
    for (int core = 0; core < CPU_SETSIZE && CPU_COUNT(&one) == 0; core++) {
      if (CPU_ISSET(core, &before_)) CPU_SET(core, &one);
    }
    EXPECT_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
  }
  ~OnOneCore() { sched_setaffinity(0, sizeof(before_), &before_); }

 private:
  cpu_set_t before_;
};

// Long enough for a worker's turns to end within it.
TEST(ThreadPoolTest, WorkersThatGiveWayComeBackToTheRegion) {
  ThreadPool pool(3);
  std::vector<std::atomic<int>> hits(400);
  for (int round = 0; round < 3; round++) {
    pool.parallel_for(400, [&](int64_t i, int) {
      const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
      while (std::chrono::steady_clock::now() < end) {
      }
      hits[i]++;
    });
  }
  for (auto& hit : hits) EXPECT_EQ(hit, 3);
}

TEST(ThreadPoolTest, OneCoreForAll) {
  OnOneCore here;
  ThreadPool pool(3);
  for (int64_t round = 0; round < 200; round++) {
    std::atomic<int64_t> sum{0};
    pool.parallel_for(10, [&](int64_t i, int) { sum += i; });
    ASSERT_EQ(sum, 45) << round;
  }
}

// The caller waits for iterations that only a worker on its own core can begin.
TEST(ThreadPoolTest, OneCoreDoesNotKeepWorkersFromWork) {
  OnOneCore here;
  check_others_go_on(2);
}

TEST(ThreadPoolTest, ThreadsMayRunWhereTheyMightBefore) {
  const cpu_set_t before = allowed_cores();
  ThreadPool pool(4);
  std::atomic<int> changed{0};
  for (int round = 0; round < 500; round++) {
    pool.parallel_for(8, [&](int64_t, int) {
      const cpu_set_t now = allowed_cores();
      if (!CPU_EQUAL(&now, &before)) changed++;
    });
  }
  EXPECT_EQ(changed, 0);
}

TEST(LeaveCore, KeepsTheAllowedCores) {
  const cpu_set_t before = allowed_cores();
  EXPECT_EQ(leave_core(sched_getcpu()), CPU_COUNT(&before) > 1);
  const cpu_set_t after = allowed_cores();
  EXPECT_TRUE(CPU_EQUAL(&after, &before));
}

TEST(LeaveCore, NeedsAnother) {
  OnOneCore here;
  const cpu_set_t before = allowed_cores();
  EXPECT_FALSE(leave_core(sched_getcpu()));
  const cpu_set_t after = allowed_cores();
  EXPECT_TRUE(CPU_EQUAL(&after, &before));
}

class CgroupTest : public ::testing::Test {
 protected:
  // Files below the folder that stands for "/".
  void write(const std::string& path, const std::string& text) {
    const std::filesystem::path file = folder_.path().string() + path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text;
  }
  std::string root() const { return folder_.path().string(); }

  testing::TemporaryFolder folder_;
};

TEST_F(CgroupTest, VersionTwoTakesTheLeastOfTheGroupAndItsParents) {
  write("/proc/self/mountinfo", "35 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 c rw\n");
  write("/proc/self/cgroup", "0::/a/b\n");
  EXPECT_EQ(cgroup_cpu_quota(root()), 0);
  write("/sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
  EXPECT_EQ(cgroup_cpu_quota(root()), 0);
  write("/sys/fs/cgroup/a/b/cpu.max", "300000 100000\n");
  EXPECT_EQ(cgroup_cpu_quota(root()), 3);
  write("/sys/fs/cgroup/a/cpu.max", "75000 50000\n");
  EXPECT_EQ(cgroup_cpu_quota(root()), 1.5);
}

TEST_F(CgroupTest, VersionOne) {
  write("/proc/self/mountinfo",
        "32 31 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n");
  write("/proc/self/cgroup", "4:memory:/m\n3:cpu,cpuacct:/job\n0::/\n");
  write("/sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us", "-1\n");
  write("/sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(cgroup_cpu_quota(root()), 0);
  write("/sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us", "200000\n");
  EXPECT_EQ(cgroup_cpu_quota(root()), 2);
}

TEST_F(CgroupTest, AContainerSeesItsGroupAsTheTop) {
  write("/proc/self/mountinfo",
        "33 31 0:30 /docker/1f /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu\n");
  write("/proc/self/cgroup", "3:cpu:/docker/1f\n");
  write("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "100000\n");
  write("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(cgroup_cpu_quota(root()), 1);
}

TEST(DefaultThreads, FollowTheEnvironment) {
  const char* before = std::getenv("MUSTAFAR_THREADS");
  const std::string saved = before != nullptr ? before : "";
  unsetenv("MUSTAFAR_THREADS");
  const int without = default_threads();
  EXPECT_GE(without, 1);
  setenv("MUSTAFAR_THREADS", "3", 1);
  EXPECT_EQ(default_threads(), 3);
  EXPECT_EQ(ThreadPool(0).size(), 3);
  EXPECT_EQ(ThreadPool(2).size(), 2);
  for (const char* wrong : {"", "0", "-1", "two", "2x"}) {
    setenv("MUSTAFAR_THREADS", wrong, 1);
    EXPECT_EQ(default_threads(), without) << wrong;
  }
  if (before != nullptr) {
    setenv("MUSTAFAR_THREADS", saved.c_str(), 1);
  } else {
    unsetenv("MUSTAFAR_THREADS");
  }
}

}  // namespace
}  // namespace mustafar
