#include "backend/cpu/linear/quantise_matrix.h"

#include <atomic>
#include <vector>

#include "backend/cpu/kernels.h"
#include "backend/cpu/workspace.h"
#include "core/buffer.h"

namespace mustafar {

bool quantise_matrix(const Matrix& stored, const QuantisedShape& shape, Isa isa, ThreadPool& pool,
                     void* memory) {
  uint8_t* const codes = static_cast<uint8_t*>(memory);
  uint16_t* const scales = reinterpret_cast<uint16_t*>(codes + shape.scales_at());
  uint16_t* const minimums = reinterpret_cast<uint16_t*>(codes + shape.offsets_at());
  const auto quantise_tile = select_kernels(isa).quantise_tile;
  std::vector<HostBuffer> scratch(pool.size());
  for (HostBuffer& buffer : scratch) grow<float>(buffer, shape.inner() * kTileRows);
  std::atomic<bool> fine = true;
  pool.parallel_for(shape.n_tiles(), [&](int64_t tile, int worker) {
    if (!quantise_tile(stored, shape, tile, codes, scales, minimums, scratch[worker].as<float>())) {
      fine = false;
    }
  });
  return fine;
}

}  // namespace mustafar
