// A CUDA runtime for tests, with what is used of the driver: takes the place of cudart_static in a
// program that links it first. Several devices; who uses or releases memory, a stream or a graph of
// one while another is current to the thread is told off, by an error and a line in `misuses`.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace fake_cuda {

struct Runtime {
  // The machine.
  int driver_version = 13000;
  int n_devices = 1;
  cudaError_t device_count_status = cudaSuccess;
  cudaError_t init_device_status = cudaSuccess;
  cudaError_t kernel_status = cudaSuccess;  // of asking for a kernel's attributes
  int64_t memory_bytes = int64_t{1} << 30;  // of each device

  // Which call fails, counted over all that may (releasing never does); -1: none.
  int64_t fail_at = -1;
  cudaError_t fail_with = cudaErrorIllegalAddress;
  // Then only cudaMalloc and cudaMallocHost count, and all from fail_at on fail: who is refused one
  // may ask for a smaller.
  bool fail_allocations_only = false;

  // What happened.
  int64_t n_calls = 0;                // that count
  std::string failed_call;            // the name of the first that was made to fail
  std::vector<std::string> log;       // calls in order, kernels as "launch"
  std::map<int, int64_t> n_launches;  // of kernels, by device
  std::map<void*, int64_t> device_memory, pinned_memory;  // live, bytes
  int n_streams = 0, n_graphs = 0, n_executables = 0;     // live
  std::map<const void*, int> device_of;                   // of everything live that belongs to one
  std::set<const void*> capturing;                        // streams
  std::vector<std::string> misuses;
  // Calls on threads that had no current device: CUDA takes the first, and makes a context there.
  int64_t n_by_default = 0;

  int64_t used_bytes() const;
  int64_t used_bytes(int device) const;
  int64_t count(const std::string& call) const;
  bool nothing_is_left() const;  // nor was anything misused
};

Runtime& runtime();
void reset();  // to a healthy machine; what is live stays known

}  // namespace fake_cuda

extern "C" {
// For fake_cublaslt.cc, whose handles belong to devices, too: the current device, and a line of
// misuses unless it is the one of `what`.
int fake_cuda_current_device();
bool fake_cuda_check_device(int device, const char* what);
}
