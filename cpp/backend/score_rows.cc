// Scoring for a device that leaves it to the host.
#include <algorithm>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/isa.h"
#include "backend/cpu/linear/row_scores.h"

namespace mustafar {

void Backend::score_rows(const float* logits, int64_t vocab, std::span<RowScore> rows, Workspace&) {
  constexpr int64_t kBlockBytes = int64_t{32} << 20;
  const Kernels kernels = select_kernels(detect_isa());
  ThreadPool pool(0);
  const int64_t n = static_cast<int64_t>(rows.size());
  const int64_t block = std::max<int64_t>(1, kBlockBytes / (vocab * 4));
  std::vector<float> host(std::min(n, block) * vocab);
  for (int64_t first = 0; first < n; first += block) {
    const int64_t count = std::min(block, n - first);
    download(host.data(), logits + first * vocab, count * vocab * 4);
    score_host_rows(pool, kernels, host.data(), vocab, rows.subspan(first, count));
  }
}

}  // namespace mustafar
