// How many threads are worth starting, and on which cores they meet.
#pragma once

#include <string>

namespace mustafar {

// MUSTAFAR_THREADS where it is a positive number; else the cores that the process may run on, or
// the CPUs that its control group's quota amounts to where that is less (rounded down, at least
// one).
int default_threads();

// The CPUs of the quotas that bind a process, least of its group's and its parents', cgroup v1
// (cpu.cfs_quota_us / cpu.cfs_period_us) and v2 (cpu.max); 0: none. `root` stands before every path
// read (/proc/self/cgroup, /proc/self/mountinfo, the mounted hierarchies): "" but in tests.
double cgroup_cpu_quota(const std::string& root = "");

// Moves the calling thread to another core that it may run on, where it is on `core`: false if
// there is none. The cores it may run on are what they were.
bool leave_core(int core);

}  // namespace mustafar
