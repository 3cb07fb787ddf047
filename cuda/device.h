// What the CUDA backend needs of the runtime: devices, memory, one stream, graphs. device.cc
// implements it on cudart; the host SIMT harness (tests/simt) has its own. No CUDA header is
// included here.
//
// A thread has a current device, the first unless it says otherwise. Memory is allocated on that
// one, streams are made on it, and both are to be used and released while their device is current.
#pragma once

#include <cstdint>
#include <functional>
#include <new>
#include <string>

#include "mustafar/error.h"

struct CUstream_st;
struct CUgraphExec_st;

namespace mustafar::cuda {

using Stream = CUstream_st*;
using Graph = CUgraphExec_st*;

struct DeviceProperties {
  std::string name;
  int32_t compute_capability = 0;  // 10 * major + minor
  int32_t n_multiprocessors = 0;
  int32_t max_shared_bytes = 0;  // a block's, after opting in
  int64_t memory_bytes = 0;
};

// Prepares a device, counted from 0 as CUDA_VISIBLE_DEVICES leaves them, for this process; what is
// current stays. Throws DeviceError saying what is missing: a driver, a device of that number, or
// code for its architecture in this build.
DeviceProperties open_device(int32_t device = 0);

// Of the current device, asked for once.
const DeviceProperties& device_properties();

// Makes an opened device the calling thread's current one for as long as this lives, and leaves the
// thread as it was, also one that has not used any device.
class DeviceScope {
 public:
  explicit DeviceScope(int32_t device);  // throws Error
  // For who releases: where it fails, as at the end of the process, so does what follows.
  DeviceScope(int32_t device, std::nothrow_t) noexcept;
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  bool entered_ = false;
};

int32_t current_device();

// Every function throws Error naming what was called and CUDA's own words; the allocating ones
// throw OutOfMemory with the need and, on the device, what is free.
void* device_allocate(int64_t bytes);
void device_free(void* pointer) noexcept;
void* pinned_allocate(int64_t bytes);  // host memory that copies run from without staging
void pinned_free(void* pointer) noexcept;
int64_t device_available_bytes();

Stream make_stream();
void destroy_stream(Stream stream) noexcept;
void synchronize(Stream stream);

// Ordered in the stream. A copy from pageable host memory has read it on return.
void copy_to_device(void* to, const void* from, int64_t bytes, Stream stream);
void copy_to_host(void* to, const void* from, int64_t bytes, Stream stream);
void copy_on_device(void* to, const void* from, int64_t bytes, Stream stream);
void fill_bytes(void* at, int value, int64_t bytes, Stream stream);

// Records what body puts into the stream instead of running it; null where graphs do not exist (the
// harness), after having run body.
Graph record_graph(Stream stream, const std::function<void()>& body);
void run_graph(Graph graph, Stream stream);
void destroy_graph(Graph graph) noexcept;

#if defined(__CUDACC__)
// Throws Error where a runtime call failed.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw Error(std::string("CUDA: ") + what + " failed: " + cudaGetErrorName(status) + ", " +
              cudaGetErrorString(status));
}
void synchronize_unless_capturing(Stream stream, const char* what);
#endif

}  // namespace mustafar::cuda
