// The runtime of cuda/device.h on the harness: host memory with guard pages, everything at once. Of
// two devices; who copies or frees memory of one while the other is current is an error.
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "cuda/cublaslt.h"
#include "cuda/device.h"
#include "simt.h"

namespace mustafar::cuda {
namespace {

struct Allocation {
  std::unique_ptr<simt::GuardedMemory> memory;
  int32_t device = 0;
};

constexpr int32_t kDevices = 2;
std::mutex g_mutex;
std::map<const void*, Allocation> g_allocations;  // by where they begin
thread_local std::vector<int32_t> t_devices;      // scopes that the thread is in

void check_device(const Allocation& allocation) {
  if (allocation.device == current_device()) return;
  throw Error("memory of device " + std::to_string(allocation.device) + " is used while device " +
              std::to_string(current_device()) + " is current");
}

// Memory that is of no device, as a test's own, may be used on any.
void check_current(const void* at) {
  const std::lock_guard lock(g_mutex);
  auto it = g_allocations.upper_bound(at);
  if (it == g_allocations.begin()) return;
  --it;
  const simt::GuardedMemory& memory = *it->second.memory;
  if (static_cast<const uint8_t*>(at) >= memory.data() + memory.bytes()) return;
  check_device(it->second);
}

void copy(void* to, const void* from, int64_t bytes) {
  check_current(to);
  check_current(from);
  if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
}

}  // namespace

DeviceScope::DeviceScope(int32_t device) : entered_(true) { t_devices.push_back(device); }
DeviceScope::DeviceScope(int32_t device, std::nothrow_t) noexcept : DeviceScope(device) {}
DeviceScope::~DeviceScope() { t_devices.pop_back(); }

int32_t current_device() { return t_devices.empty() ? 0 : t_devices.back(); }

const DeviceProperties& device_properties() {
  static const DeviceProperties properties = open_device(0);
  return properties;
}

DeviceProperties open_device(int32_t device) {
  if (device >= kDevices)
    throw DeviceError("the harness has " + std::to_string(kDevices) + " GPUs");
  DeviceProperties properties;
  properties.name = "host SIMT harness";
  properties.compute_capability = 80;
  properties.n_multiprocessors = 2;
  properties.max_shared_bytes = 99 << 10;
  properties.memory_bytes = int64_t{1} << 32;
  return properties;
}

// Fresh memory is full of NaNs.
void* device_allocate(int64_t bytes) {
  auto memory = std::make_unique<simt::GuardedMemory>(static_cast<size_t>(bytes));
  void* const data = memory->data();
  std::memset(data, 0xff, static_cast<size_t>(bytes));
  const std::lock_guard lock(g_mutex);
  g_allocations.emplace(data, Allocation{std::move(memory), current_device()});
  return data;
}

void device_free(void* pointer) noexcept {
  const std::lock_guard lock(g_mutex);
  const auto it = g_allocations.find(pointer);
  if (it == g_allocations.end()) return;
  // Either terminates: freeing can't report.
  it->second.memory->check("device memory");
  check_device(it->second);
  g_allocations.erase(it);
}

void* pinned_allocate(int64_t bytes) { return device_allocate(bytes); }
void pinned_free(void* pointer) noexcept { device_free(pointer); }
int64_t device_available_bytes() { return int64_t{1} << 32; }

Stream make_stream() { return nullptr; }
void destroy_stream(Stream) noexcept {}
void synchronize(Stream) {}

void copy_to_device(void* to, const void* from, int64_t bytes, Stream) { copy(to, from, bytes); }
void copy_to_host(void* to, const void* from, int64_t bytes, Stream) { copy(to, from, bytes); }
void copy_on_device(void* to, const void* from, int64_t bytes, Stream) { copy(to, from, bytes); }
void fill_bytes(void* at, int value, int64_t bytes, Stream) {
  check_current(at);
  if (bytes > 0) std::memset(at, value, static_cast<size_t>(bytes));
}

std::unique_ptr<CublasLt> CublasLt::open() { return nullptr; }

Graph record_graph(Stream, const std::function<void()>& body) {
  body();
  return nullptr;
}
void run_graph(Graph, Stream) {}
void destroy_graph(Graph) noexcept {}

}  // namespace mustafar::cuda
