// The runtime of cuda/device.h on the harness: host memory with guard pages, everything at once.
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "cuda/cublaslt.h"
#include "cuda/device.h"
#include "simt.h"

namespace mustafar::cuda {
namespace {

std::mutex g_mutex;
std::map<void*, std::unique_ptr<simt::GuardedMemory>> g_allocations;

}  // namespace

DeviceProperties open_device() {
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
  g_allocations.emplace(data, std::move(memory));
  return data;
}

void device_free(void* pointer) noexcept {
  const std::lock_guard lock(g_mutex);
  const auto it = g_allocations.find(pointer);
  if (it == g_allocations.end()) return;
  it->second->check("device memory");  // terminates: freeing can't report
  g_allocations.erase(it);
}

void* pinned_allocate(int64_t bytes) { return device_allocate(bytes); }
void pinned_free(void* pointer) noexcept { device_free(pointer); }
int64_t device_available_bytes() { return int64_t{1} << 32; }

Stream make_stream() { return nullptr; }
void destroy_stream(Stream) noexcept {}
void synchronize(Stream) {}

void copy_to_device(void* to, const void* from, int64_t bytes, Stream) {
  if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
}
void copy_to_host(void* to, const void* from, int64_t bytes, Stream) {
  if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
}
void copy_on_device(void* to, const void* from, int64_t bytes, Stream) {
  if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
}
void fill_bytes(void* at, int value, int64_t bytes, Stream) {
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
