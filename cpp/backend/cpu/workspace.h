// Scratch of one call in flight on the CPU.
#pragma once

#include <cstdint>
#include <functional>
#include <new>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "core/buffer.h"
#include "mustafar/error.h"

namespace mustafar {

struct CpuWorkspace final : Workspace {
  HostBuffer normed;  // [rows][hidden]
  HostBuffer keys;    // [rows][n_kv_heads * D]
  HostBuffer values;  // likewise
  HostBuffer gated;   // [rows][intermediate]
  HostBuffer packed;  // a GEMM's input
  HostBuffer branch;  // [rows][hidden]: what is normed before it is added to x
  // Int8Input of one plane and of two: [2][rows][groups], then codes [rows][inner][planes].
  HostBuffer int8_input[2];
  HostBuffer int8_tiles;            // those of two as Kernels::tile_int8_input makes them as well
  HostBuffer terms;                 // a product's activations as Kernels::split_terms makes them
  HostBuffer rope;                  // [2 (cos, sin)][rows][rope dims / 2]
  HostBuffer attention;             // decode attention's partial results
  std::vector<HostBuffer> workers;  // [threads]

  // Where it is set, sees the n_rows rows of inputs [matrix.cols] of every product of a prompt with
  // a layer's matrices, by the first of those that read the same.
  std::function<void(const Matrix& matrix, const float* x, int64_t n_rows)> observe_input;

  // What rope holds.
  struct RopeRow {
    int32_t position = 0;
    const float* frequencies = nullptr;
    bool operator==(const RopeRow&) const = default;
  };
  std::vector<RopeRow> rope_rows;

  int64_t bytes() const override {
    size_t sum = 0;
    for (const HostBuffer* buffer :
         {&normed, &keys, &values, &gated, &packed, &branch, &int8_input[0], &int8_input[1],
          &int8_tiles, &terms, &rope, &attention}) {
      sum += buffer->bytes();
    }
    for (const HostBuffer& buffer : workers) sum += buffer.bytes();
    return static_cast<int64_t>(sum);
  }
};

// Room for n elements; what was there is lost. Throws OutOfMemory.
template <typename T>
T* grow(HostBuffer& buffer, int64_t n) {
  try {
    buffer.ensure(static_cast<size_t>(n) * sizeof(T));
  } catch (const std::bad_alloc&) {
    throw OutOfMemory("CPU workspace: can't allocate " + std::to_string(n * sizeof(T)) + " bytes");
  }
  return buffer.as<T>();
}

}  // namespace mustafar
