// A task is one KV head of one sequence and a tile of its query tokens, with all query heads of the
// group: their rows (token-major) share every key tile that is expanded and packed.
#include "backend/cpu/attention/prefill.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <vector>

namespace mustafar {
namespace {

constexpr int32_t kMaxPanels = 32;  // of query rows per task: their state stays in the L2 cache
// More keys than any tile has, and far enough from overflow to count rows from.
constexpr int32_t kSeesAll = std::numeric_limits<int32_t>::max() / 2;

struct Task {
  const SequenceStep* sequence = nullptr;
  int32_t kv_head = 0;
  int32_t token0 = 0;  // of the call's rows
  int32_t n_tokens = 0;
};

// Offsets, in words, of the parts of a worker's scratch.
struct Scratch {
  int64_t q, k, v, max, sum, out, panel, expanded, end;
  int32_t depth, depth_blocks, out_stride, v_panel;

  Scratch(const GemmKernels& gemm, int32_t head_dim, int32_t group) {
    depth = (head_dim + gemm.unit - 1) / gemm.unit;
    depth_blocks = (depth + kGemmSteps - 1) / kGemmSteps;
    out_stride = (head_dim + gemm.cols - 1) / gemm.cols * gemm.cols;
    v_panel = kKeyTile / gemm.unit * gemm.cols;
    const int64_t rows = std::max(kMaxPanels, group / gemm.rows + 1) * int64_t{gemm.rows};
    int64_t at = 0;
    const auto take = [&at](int64_t words) {
      const int64_t start = at;
      at += (words + 31) / 32 * 32;
      return start;
    };
    q = take(rows * depth_blocks * kGemmStride);
    k = take(int64_t{kKeyTile + gemm.cols} * depth);
    v = take(int64_t{out_stride / gemm.cols} * v_panel);
    max = take(rows);
    sum = take(rows);
    out = take(rows * out_stride);
    panel = take(attend_scratch_words(gemm.rows));
    expanded = take(int64_t{2} * kKeyTile * head_dim);  // f32 keys, then values, of four blocks
    end = at;
  }
};

class TaskRunner {
 public:
  TaskRunner(const Kernels& kernels, const GemmKernels& gemm, const PrefillAttentionArgs& args,
             const Scratch& layout, const Task& task, float* scratch)
      : kernels_(kernels),
        gemm_(gemm),
        args_(args),
        layout_(layout),
        task_(task),
        step_(*task.sequence),
        scratch_(scratch),
        group_(args.n_heads / args.n_kv_heads),
        n_rows_(task.n_tokens * group_),
        n_panels_((n_rows_ + gemm.rows - 1) / gemm.rows) {}

  void run() {
    const GemmScope scope(gemm_);
    pack_queries();
    std::fill_n(scratch_ + layout_.max, n_rows_, -std::numeric_limits<float>::infinity());
    std::fill_n(scratch_ + layout_.sum, n_rows_, 0.0f);
    std::fill_n(scratch_ + layout_.out, int64_t{n_panels_} * gemm_.rows * layout_.out_stride, 0.0f);

    find_hidden();
    attend_store();
    const DenseRun keys = dense_rows(kKeys), values = dense_rows(kValues);
    attend_rows(keys.dense, values.dense, step_.dense_tokens, kSeesAll, &HiddenRows::dense);
    // The task's first token sees the call's tokens up to itself.
    const int32_t first_sees = step_.pos0 + task_.token0 - step_.fresh_pos0 + 1;
    attend_rows(keys.fresh, values.fresh, first_sees + task_.n_tokens - 1, first_sees,
                &HiddenRows::fresh);
    store_output();
  }

 private:
  const float* row_in(const float* base, int32_t row) const {
    const int32_t token = row / group_, head = row % group_;
    return base + (int64_t{step_.row0} + task_.token0 + token) * args_.n_heads * args_.head_dim +
           (int64_t{task_.kv_head} * group_ + head) * args_.head_dim;
  }

  float* packed_queries(int32_t panel) const {
    return scratch_ + layout_.q + int64_t{panel} * layout_.depth_blocks * gemm_.rows * kGemmStride;
  }

  void pack_queries() {
    const float factor =
        std::numbers::log2e_v<float> / std::sqrt(static_cast<float>(args_.head_dim));
    const int32_t block = kGemmSteps * gemm_.unit;
    for (int32_t row = 0; row < n_rows_; row++) {
      float* to = packed_queries(row / gemm_.rows) + (row % gemm_.rows) * kGemmStride;
      const float* from = row_in(args_.q, row);
      for (int32_t d = 0; d < args_.head_dim; d += block) {
        gemm_.pack_input(from + d, 0, 1, std::min(block, args_.head_dim - d), factor, to);
        to += gemm_.rows * kGemmStride;
      }
    }
  }

  // What a window hides from the task's tokens; nothing where it reaches back to the first.
  void find_hidden() {
    const int32_t window = step_.window(args_.layer);
    const int32_t first = step_.pos0 + task_.token0 - window + 1;
    if (window == 0 || first + task_.n_tokens - 1 <= 0) return;
    for (int32_t i = 0; i < task_.n_tokens; i++) hidden_.push_back(hidden_before(step_, first + i));
  }

  // Whether none of the task's tokens sees the first n rows of a part of the cache.
  bool all_hidden(int32_t HiddenRows::* part, int32_t n) const {
    return !hidden_.empty() && hidden_[0].*part >= n;
  }

  // Tiles begin where they would if no block had been dropped, and so sums have the same order.
  void attend_store() {
    constexpr int32_t kBlocks = kKeyTile / kBlockTokens;
    float* keys = scratch_ + layout_.expanded;
    float* values = keys + int64_t{kKeyTile} * args_.head_dim;
    for (int32_t block = 0, n; block < step_.n_blocks; block += n) {
      n = std::min(kBlocks - (step_.dropped_blocks + block) % kBlocks, step_.n_blocks - block);
      if (all_hidden(&HiddenRows::store, (block + n) * kBlockTokens)) continue;
      for (int32_t i = 0; i < n; i++) {
        const uint8_t* page = step_.pages[block + i];
        const StoreLayout& store = *step_.layout;
        const SlotLayout& k_layout = slot_of(store, args_.layer, true);
        const SlotLayout& v_layout = slot_of(store, args_.layer, false);
        const int64_t at = int64_t{i} * kBlockTokens * args_.head_dim;
        const uint8_t* k_slot = page + k_slot_offset(store, args_.layer, task_.kv_head);
        const uint8_t* v_slot = page + v_slot_offset(store, args_.layer, task_.kv_head);
        if (k_layout.dtype == DType::kCoded) {
          const auto table = [&](bool is_key) {
            return code_table(step_.codes, store, args_.layer, task_.kv_head, is_key);
          };
          kernels_.unpack_coded_slot(k_layout, table(true), k_slot, keys + at);
          kernels_.unpack_coded_slot(v_layout, table(false), v_slot, values + at);
          continue;
        }
        kernels_.unpack_slot(k_layout, k_slot, keys + at);
        kernels_.unpack_slot(v_layout, v_slot, values + at);
      }
      attend_tile(keys, values, DType::kF32, n * kBlockTokens, n * kBlockTokens, &HiddenRows::store,
                  block * kBlockTokens);
    }
  }

  DenseRun dense_rows(int32_t kind) const {
    return dense_run(step_, step_.dense_tokens, args_.layer, kind, args_.n_kv_heads, task_.kv_head,
                     dtype_bytes(args_.tail_dtype, args_.head_dim));
  }

  // n keys and values [n][D] of the tail type. The task's token i sees the first (first_sees + i)
  // of them, but for those hidden.
  void attend_rows(const uint8_t* keys, const uint8_t* values, int32_t n, int32_t first_sees,
                   int32_t HiddenRows::* part) {
    const DType dtype = args_.tail_dtype;
    for (int32_t token = 0; token < n; token += kKeyTile) {
      const int32_t tile = std::min(kKeyTile, n - token);
      if (all_hidden(part, token + tile)) continue;
      const int64_t at = dtype_bytes(dtype, int64_t{token} * args_.head_dim);
      attend_tile(keys + at, values + at, dtype, tile, first_sees - token, part, token);
    }
  }

  // n <= kKeyTile keys and values [n][D] from row `row` of a part of the cache on; the task's token
  // i sees the first (first_sees + i) of them, but for those hidden.
  void attend_tile(const void* keys, const void* values, DType dtype, int32_t n, int32_t first_sees,
                   int32_t HiddenRows::* part, int32_t row) {
    const int32_t dim = args_.head_dim;
    const uint8_t* k = static_cast<const uint8_t*>(keys);
    const uint8_t* v = static_cast<const uint8_t*>(values);
    const int32_t block = kGemmSteps * gemm_.unit;
    float* packed = scratch_ + layout_.k;
    for (int32_t key = 0; key < n; key += gemm_.cols) {
      for (int32_t d = 0; d < dim; d += block) {
        const int32_t dims = std::min(block, dim - d);
        gemm_.pack_weights(k + dtype_bytes(dtype, int64_t{key} * dim + d), dtype, dim,
                           std::min(gemm_.cols, n - key), dims, packed);
        packed += int64_t{(dims + gemm_.unit - 1) / gemm_.unit} * gemm_.cols;
      }
    }
    for (int32_t d = 0; d < dim; d += gemm_.cols) {
      gemm_.pack_values(v + dtype_bytes(dtype, d), dtype, dim, n, std::min(gemm_.cols, dim - d),
                        scratch_ + layout_.v + int64_t{d / gemm_.cols} * layout_.v_panel);
    }

    AttendPanel panel;
    panel.head_dim = dim;
    panel.k = scratch_ + layout_.k;
    panel.v = scratch_ + layout_.v;
    panel.v_panel = layout_.v_panel;
    panel.scratch = scratch_ + layout_.panel;
    std::vector<int32_t>& visible = visible_;
    visible.resize(gemm_.rows);
    panel.visible = visible.data();
    // The last token's window begins last.
    const bool hides = !hidden_.empty() && hidden_.back().*part > row;
    std::vector<int32_t>& hidden = tile_hidden_;
    hidden.resize(gemm_.rows);
    if (hides) panel.hidden = hidden.data();
    for (int32_t p = 0; p < n_panels_; p++) {
      const int32_t row0 = p * gemm_.rows;
      panel.n_rows = std::min(gemm_.rows, n_rows_ - row0);
      for (int32_t r = 0; r < panel.n_rows; r++) {
        const int32_t token = (row0 + r) / group_;
        visible[r] = std::clamp(first_sees + token, 0, n);
        if (hides) hidden[r] = std::clamp(hidden_[token].*part - row, 0, visible[r]);
      }
      panel.q = packed_queries(p);
      panel.max = scratch_ + layout_.max + row0;
      panel.sum = scratch_ + layout_.sum + row0;
      panel.out = scratch_ + layout_.out + int64_t{row0} * layout_.out_stride;
      gemm_.attend(panel);
    }
  }

  void store_output() {
    for (int32_t row = 0; row < n_rows_; row++) {
      kernels_.scale(scratch_ + layout_.out + int64_t{row} * layout_.out_stride,
                     1.0f / scratch_[layout_.sum + row], args_.head_dim,
                     const_cast<float*>(row_in(args_.out, row)));
    }
  }

  const Kernels& kernels_;
  const GemmKernels& gemm_;
  const PrefillAttentionArgs& args_;
  const Scratch& layout_;
  const Task& task_;
  const SequenceStep& step_;
  float* scratch_;
  int32_t group_;
  int32_t n_rows_;
  int32_t n_panels_;
  std::vector<HiddenRows> hidden_;    // [n_tokens] of the task, or none
  std::vector<int32_t> visible_;      // [gemm.rows]
  std::vector<int32_t> tile_hidden_;  // [gemm.rows]
};

}  // namespace

void prefill_attention(ThreadPool& pool, const Kernels& kernels, const GemmKernels& gemm,
                       const PrefillAttentionArgs& args, CpuWorkspace& workspace) {
  const int32_t group = args.n_heads / args.n_kv_heads;
  const Scratch layout(gemm, args.head_dim, group);
  workspace.workers.resize(pool.size());
  for (HostBuffer& buffer : workspace.workers) grow<float>(buffer, layout.end);

  std::vector<Task> tasks;
  int64_t all_rows = 0;
  for (const SequenceStep& step : args.sequences) all_rows += step.n_rows;
  for (const SequenceStep& step : args.sequences) {
    int32_t tile = std::max(1, kMaxPanels * gemm.rows / group);
    // Tasks of this sequence, so that with those of the others threads end together.
    const int64_t wanted = (3 * pool.size() * step.n_rows + all_rows - 1) / all_rows;
    while (tile * group > 2 * gemm.rows &&
           int64_t{args.n_kv_heads} * ((step.n_rows + tile - 1) / tile) < wanted) {
      tile = (tile + 1) / 2;
    }
    // The last tokens see most: they go first.
    for (int32_t end = step.n_rows; end > 0; end -= tile) {
      const int32_t token0 = std::max(0, end - tile);
      for (int32_t head = 0; head < args.n_kv_heads; head++) {
        tasks.push_back({&step, head, token0, end - token0});
      }
    }
  }
  pool.parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t i, int worker) {
    TaskRunner(kernels, gemm, args, layout, tasks[i], workspace.workers[worker].as<float>()).run();
  });
}

}  // namespace mustafar
