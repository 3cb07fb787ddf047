// A CUDA runtime for tests: takes the place of cudart_static in a program that links it first.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace fake_cuda {

struct Runtime {
  // The machine.
  int driver_version = 13000;
  int n_devices = 1;
  cudaError_t device_count_status = cudaSuccess;
  cudaError_t set_device_status = cudaSuccess;
  cudaError_t kernel_status = cudaSuccess;  // of asking for a kernel's attributes
  int64_t memory_bytes = int64_t{1} << 30;

  // Which call fails, counted over all that may (releasing never does); -1: none.
  int64_t fail_at = -1;
  cudaError_t fail_with = cudaErrorIllegalAddress;
  // Then only cudaMalloc and cudaMallocHost count, and all from fail_at on fail: who is refused one
  // may ask for a smaller.
  bool fail_allocations_only = false;

  // What happened.
  int64_t n_calls = 0;           // that count
  std::string failed_call;       // the name of the first that was made to fail
  std::vector<std::string> log;  // calls in order, kernels as "launch"
  std::map<void*, int64_t> device_memory, pinned_memory;  // live, bytes
  int n_streams = 0, n_graphs = 0, n_executables = 0;     // live
  bool capturing = false;

  int64_t used_bytes() const;
  int64_t count(const std::string& call) const;
  bool nothing_is_left() const;
};

Runtime& runtime();
void reset();  // to a healthy machine; what is live stays known

}  // namespace fake_cuda
