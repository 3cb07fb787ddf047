#include "core/available_cores.h"

#include <sched.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string_view>
#include <thread>
#include <vector>

namespace mustafar {
namespace {

struct Mount {
  std::string root;   // of the hierarchy, as it is seen at `point`
  std::string point;  // where it is mounted
  bool v2 = false;
};

bool holds(std::string_view comma_list, std::string_view item) {
  for (size_t begin = 0; begin <= comma_list.size();) {
    const size_t end = std::min(comma_list.find(',', begin), comma_list.size());
    if (comma_list.substr(begin, end - begin) == item) return true;
    begin = end + 1;
  }
  return false;
}

// A line of mountinfo (man 5 proc): "id parent major:minor root point options... - type source
// super-options".
std::vector<Mount> cpu_mounts(const std::string& root) {
  std::vector<Mount> mounts;
  std::ifstream file(root + "/proc/self/mountinfo");
  for (std::string line; std::getline(file, line);) {
    std::istringstream fields(line);
    std::string skipped, type, source, super;
    Mount mount;
    fields >> skipped >> skipped >> skipped >> mount.root >> mount.point;
    while (fields >> skipped && skipped != "-") {
    }
    if (!(fields >> type >> source >> super)) continue;
    mount.v2 = type == "cgroup2";
    if (mount.v2 || (type == "cgroup" && holds(super, "cpu"))) mounts.push_back(std::move(mount));
  }
  return mounts;
}

// The process's path in the hierarchy that holds the cpu controller: lines "id:controllers:path",
// with no controllers in version 2. Empty: it is in none.
std::string group_path(const std::string& root, bool v2) {
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string_view controllers =
        std::string_view(line).substr(first + 1, second - first - 1);
    if (v2 ? controllers.empty() : holds(controllers, "cpu")) return line.substr(second + 1);
  }
  return {};
}

// CPUs that one group may use; 0: no limit of its own, or nothing readable.
double quota_of(const std::string& folder, bool v2) {
  double quota = 0, period = 0;
  if (v2) {  // "max 100000" or "150000 100000"
    std::ifstream(folder + "/cpu.max") >> quota >> period;
  } else {  // -1: no limit
    std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;
    std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  }
  return quota > 0 && period > 0 ? quota / period : 0;
}

int cores_by_affinity() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace

double cgroup_cpu_quota(const std::string& root) {
  double least = 0;
  for (const Mount& mount : cpu_mounts(root)) {
    std::string path = group_path(root, mount.v2);
    if (path.empty()) continue;
    // A container may see its own group as the top of the mount, while /proc names it from the
    // host's top.
    if (mount.root != "/" && path.starts_with(mount.root)) path.erase(0, mount.root.size());
    for (;;) {
      const double quota = quota_of(root + mount.point + path, mount.v2);
      if (quota > 0 && (least == 0 || quota < least)) least = quota;
      const size_t slash = path.find_last_of('/');
      if (slash == std::string::npos) break;
      path.resize(slash);
    }
  }
  return least;
}

int default_threads() {
  if (const char* text = std::getenv("MUSTAFAR_THREADS")) {
    const char* end = text + std::string_view(text).size();
    int threads = 0;
    const auto [at, error] = std::from_chars(text, end, threads);
    if (error == std::errc() && at == end && threads > 0) return threads;
  }
  const int cores = cores_by_affinity();
  const double quota = cgroup_cpu_quota();
  return quota > 0 ? std::clamp(static_cast<int>(quota), 1, cores) : cores;
}

bool leave_core(int core) {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return false;  // over 1024 cores
  cpu_set_t others = allowed;
  CPU_CLR(core, &others);
  if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof(others), &others) != 0) return false;
  sched_setaffinity(0, sizeof(allowed), &allowed);
  return true;
}

}  // namespace mustafar
