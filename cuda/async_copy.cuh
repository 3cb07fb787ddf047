// Asynchronous copies from global to shared memory: like device_ops.cuh, PTX under nvcc and calls
// of the harness elsewhere.
#pragma once

#include "cuda/device_ops.cuh"

namespace mustafar::cuda {

// Copies 16 bytes, both addresses aligned to 16, without leaving them in the L1.
__device__ __forceinline__ void cp_async16(void* to_shared, const void* from) {
#if defined(MUSTAFAR_SIMT)
  simt::cp_async(to_shared, from, 16);
#else
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#endif
}

// Copies 4 or 8 bytes, both addresses aligned to as many.
template <int kBytes>
__device__ __forceinline__ void cp_async_few(void* to_shared, const void* from) {
  static_assert(kBytes == 4 || kBytes == 8);
#if defined(MUSTAFAR_SIMT)
  simt::cp_async(to_shared, from, kBytes);
#else
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes)
               : "memory");
#endif
}

// 16 bytes as cp_async16 does, or 16 zero bytes where there is nothing to copy; from is then not
// read.
__device__ __forceinline__ void cp_async16_or_zero(void* to_shared, const void* from, bool copy) {
#if defined(MUSTAFAR_SIMT)
  alignas(16) static const uint8_t kZeros[16] = {};
  simt::cp_async(to_shared, copy ? from : kZeros, 16);
#else
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  const uint32_t bytes = copy ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#if defined(MUSTAFAR_SIMT)
  simt::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kGroups of this thread's groups are still under way.
template <int kGroups>
__device__ __forceinline__ void cp_async_wait() {
#if defined(MUSTAFAR_SIMT)
  simt::cp_async_wait(kGroups);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

}  // namespace mustafar::cuda
