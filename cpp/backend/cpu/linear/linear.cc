#include "backend/cpu/linear/linear.h"

#include <algorithm>
#include <vector>

namespace mustafar {
namespace {

constexpr int64_t kGemvTaskBytes = 256 * 1024;  // of weights: some ten microseconds
constexpr int64_t kGemmTaskRows = 512;  // inputs per task: a depth block and its results stay in L2

// Rows [row0, row1) of one of several layers; of a GEMM, by input panels [panel0, panel1).
struct Task {
  int32_t layer = 0;
  int64_t row0 = 0;
  int64_t row1 = 0;
  int64_t panel0 = 0;
  int64_t panel1 = 0;
};

void split(int32_t layer, int64_t rows, int64_t step, std::vector<Task>& tasks) {
  for (int64_t row = 0; row < rows; row += step) {
    tasks.push_back({layer, row, std::min(rows, row + step)});
  }
}

// Rows per GEMV task: whole blocks of four, several tasks per thread so that a slow one is evened
// out.
int64_t gemv_task_rows(const Matrix& w, int threads) {
  const int64_t row_bytes = std::max<int64_t>(1, dtype_bytes(w.dtype, w.cols));
  const int64_t rows = std::min(kGemvTaskBytes / row_bytes, w.rows / (4 * threads));
  return std::max<int64_t>(4, rows / 4 * 4);
}

// Outputs per GEMM task: a multiple of the panel, smaller where threads would be left without.
int64_t gemm_task_cols(const GemmKernels& gemm, int64_t outputs, int threads) {
  int64_t cols = gemm.task_cols;
  while (cols > gemm.cols && outputs / cols < 4 * threads) cols -= gemm.cols;
  return std::max<int64_t>(gemm.cols, cols);
}

// Input panels per GEMM task.
int64_t gemm_task_panels(const GemmKernels& gemm, const PackedInput& x) {
  return std::min(x.n_panels(), std::max<int64_t>(1, kGemmTaskRows / gemm.rows));
}

// For each block of input panels all outputs of all layers: threads share the inputs while caches
// hold them.
std::vector<Task> gemm_tasks(const GemmKernels& gemm, const PackedInput& x, int64_t step,
                             std::span<const int64_t> outputs) {
  std::vector<Task> tasks;
  const int64_t panels = gemm_task_panels(gemm, x);
  for (int64_t panel = 0; panel < x.n_panels(); panel += panels) {
    const size_t first = tasks.size();
    for (size_t i = 0; i < outputs.size(); i++) {
      split(static_cast<int32_t>(i), outputs[i], step, tasks);
    }
    for (size_t t = first; t < tasks.size(); t++) {
      tasks[t].panel0 = panel;
      tasks[t].panel1 = std::min(x.n_panels(), panel + panels);
    }
  }
  return tasks;
}

// Room in every worker's scratch for a weight panel and `results` results of `cols` outputs.
void grow_gemm_scratch(ThreadPool& pool, const GemmKernels& gemm, const PackedInput& x,
                       int64_t cols, int results, CpuWorkspace& workspace) {
  const int64_t words =
      int64_t{kGemmSteps} * gemm.cols + results * gemm_task_panels(gemm, x) * gemm.rows * cols;
  workspace.workers.resize(pool.size());
  for (HostBuffer& buffer : workspace.workers) grow<float>(buffer, words);
}

// Prefetches part `i` of `parts` of n_rows rows of `bytes` bytes, stride_bytes apart.
void prefetch_part(const uint8_t* rows, int64_t n_rows, int64_t bytes, int64_t stride_bytes,
                   int64_t i, int64_t parts) {
  const int64_t lines = (bytes + 63) / 64, all = n_rows * lines;
  for (int64_t line = all * i / parts; line < all * (i + 1) / parts; line++) {
    __builtin_prefetch(rows + line / lines * stride_bytes + line % lines * 64, 0, 2);
  }
}

// result [output panel][rows of the task's input panels][gemm.cols] = x W^T for the task's rows of
// w.
void multiply(const GemmKernels& gemm, const PackedInput& x, const Matrix& w, const Task& task,
              float* panel, float* result) {
  const GemmScope scope(gemm);
  const int64_t n_panels = task.panel1 - task.panel0;
  const int64_t result_rows = n_panels * gemm.rows;
  const int64_t stride_bytes = dtype_bytes(w.dtype, w.cols);
  int64_t col = 0;
  for (int64_t block = 0; block < x.n_blocks(); block++) {
    const int32_t n = x.block_cols(block);
    const int32_t steps = (n + gemm.unit - 1) / gemm.unit;
    const int64_t block_bytes = dtype_bytes(w.dtype, n);
    for (int64_t row = task.row0; row < task.row1; row += gemm.cols) {
      const int32_t n_outputs = static_cast<int32_t>(std::min<int64_t>(gemm.cols, task.row1 - row));
      const uint8_t* weights =
          static_cast<const uint8_t*>(w.data) + row * stride_bytes + dtype_bytes(w.dtype, col);
      gemm.pack_weights(weights, w.dtype, w.cols, n_outputs, n, panel);

      // The next panel comes from memory while this one is multiplied: the next rows or, after the
      // last ones, the next columns.
      const bool last = row + gemm.cols >= task.row1;
      const int64_t next_row = last ? task.row0 : row + gemm.cols;
      const uint8_t* next = static_cast<const uint8_t*>(w.data) + next_row * stride_bytes +
                            dtype_bytes(w.dtype, last ? col + n : col);
      const int64_t next_rows = last && block + 1 == x.n_blocks()
                                    ? 0
                                    : std::min<int64_t>(gemm.cols, task.row1 - next_row);

      float* c = result + (row - task.row0) * result_rows;
      for (int32_t step = 0; step < steps; step += gemm.depth) {
        const int32_t depth = std::min(gemm.depth, steps - step);
        for (int64_t p = 0; p < n_panels; p++) {
          if (step == 0) prefetch_part(next, next_rows, block_bytes, stride_bytes, p, n_panels);
          gemm.tile(depth, x.panel(block, task.panel0 + p) + step, panel + step * gemm.cols,
                    x.panel_rows(task.panel0 + p), c + p * gemm.rows * gemm.cols, gemm.cols,
                    block > 0 || step > 0);
        }
      }
    }
    col += n;
  }
}

}  // namespace

PackedInput::PackedInput(const GemmKernels& gemm, int64_t n_rows, int64_t n_cols,
                         HostBuffer& storage)
    : gemm_(gemm),
      n_rows_(n_rows),
      n_cols_(n_cols),
      n_panels_((n_rows + gemm.rows - 1) / gemm.rows),
      n_blocks_((n_cols + kGemmSteps * gemm.unit - 1) / (kGemmSteps * gemm.unit)),
      data_(grow<float>(storage, n_blocks_ * n_panels_ * gemm.rows * kGemmStride)) {}

int32_t PackedInput::block_cols(int64_t block) const {
  const int64_t all = int64_t{kGemmSteps} * gemm_.unit;
  return static_cast<int32_t>(std::min(all, n_cols_ - block * all));
}

int32_t PackedInput::panel_rows(int64_t panel) const {
  return static_cast<int32_t>(std::min<int64_t>(gemm_.rows, n_rows_ - panel * gemm_.rows));
}

const float* PackedInput::panel(int64_t block, int64_t panel) const {
  return data_ + (block * n_panels_ + panel) * gemm_.rows * kGemmStride;
}

void PackedInput::pack(int64_t panel, const float* x, int64_t stride) const {
  for (int64_t block = 0; block < n_blocks_; block++) {
    gemm_.pack_input(x + block * kGemmSteps * gemm_.unit, stride, panel_rows(panel),
                     block_cols(block), 1.0f,
                     data_ + (block * n_panels_ + panel) * gemm_.rows * kGemmStride);
  }
}

void decode_linear(ThreadPool& pool, const Kernels& kernels, std::span<const LinearLayer> layers,
                   const float* x, int64_t x_stride, int32_t batch) {
  std::vector<Task> tasks;
  for (size_t i = 0; i < layers.size(); i++) {
    const Matrix& w = *layers[i].weights;
    split(static_cast<int32_t>(i), w.rows, gemv_task_rows(w, pool.size()), tasks);
  }
  pool.parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t i, int) {
    const Task& task = tasks[i];
    const LinearLayer& layer = layers[task.layer];
    GemvArgs args;
    args.weights = layer.weights->data;
    args.dtype = layer.weights->dtype;
    args.cols = layer.weights->cols;
    args.row0 = task.row0;
    args.row1 = task.row1;
    args.x = x;
    args.x_stride = x_stride;
    args.batch = batch;
    args.bias = layer.bias;
    args.y = layer.out + task.row0;
    args.y_stride = layer.out_stride;
    args.add = layer.add;
    kernels.gemv(args);
  });
}

void decode_gate_up(ThreadPool& pool, const Kernels& kernels, const LayerWeights& layer,
                    const float* x, int32_t batch, float* out, CpuWorkspace& workspace) {
  const int64_t n = layer.gate.rows;
  const int64_t step = gemv_task_rows(layer.gate, pool.size());
  workspace.workers.resize(pool.size());
  for (HostBuffer& buffer : workspace.workers) grow<float>(buffer, batch * step);
  pool.parallel_for((n + step - 1) / step, [&](int64_t i, int worker) {
    const int64_t row0 = i * step, row1 = std::min(n, row0 + step);
    float* up = workspace.workers[worker].as<float>();  // [batch][step]
    GemvArgs args;
    args.cols = layer.gate.cols;
    args.row0 = row0;
    args.row1 = row1;
    args.x = x;
    args.x_stride = layer.gate.cols;
    args.batch = batch;

    args.weights = layer.gate.data;
    args.dtype = layer.gate.dtype;
    args.y = out + row0;
    args.y_stride = n;
    kernels.gemv(args);

    args.weights = layer.up.data;
    args.dtype = layer.up.dtype;
    args.y = up;
    args.y_stride = step;
    kernels.gemv(args);

    for (int32_t b = 0; b < batch; b++) {
      float* gate = out + b * n + row0;
      kernels.silu_mul(
          gate, up + b * step, layer.gate_bias != nullptr ? layer.gate_bias + row0 : nullptr,
          layer.up_bias != nullptr ? layer.up_bias + row0 : nullptr, row1 - row0, gate);
    }
  });
}

void prefill_linear(ThreadPool& pool, const Kernels& kernels, const GemmKernels& gemm,
                    std::span<const LinearLayer> layers, const PackedInput& x,
                    CpuWorkspace& workspace) {
  std::vector<int64_t> outputs;
  int64_t all = 0;
  for (const LinearLayer& layer : layers) all += outputs.emplace_back(layer.weights->rows);
  const int64_t step = gemm_task_cols(gemm, all, pool.size());
  const std::vector<Task> tasks = gemm_tasks(gemm, x, step, outputs);
  grow_gemm_scratch(pool, gemm, x, step, 1, workspace);
  pool.parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t i, int worker) {
    const Task& task = tasks[i];
    const LinearLayer& layer = layers[task.layer];
    float* panel = workspace.workers[worker].as<float>();
    float* result = panel + int64_t{kGemmSteps} * gemm.cols;
    multiply(gemm, x, *layer.weights, task, panel, result);
    const int64_t result_rows = (task.panel1 - task.panel0) * gemm.rows;
    const int64_t first = task.panel0 * gemm.rows;
    const int64_t n_rows = std::min(result_rows, x.n_rows() - first);
    for (int64_t r = 0; r < n_rows; r++) {
      for (int64_t row = task.row0; row < task.row1; row += gemm.cols) {
        kernels.store(result + (row - task.row0) * result_rows + r * gemm.cols,
                      layer.bias != nullptr ? layer.bias + row : nullptr,
                      std::min<int64_t>(gemm.cols, task.row1 - row), layer.add,
                      layer.out + (first + r) * layer.out_stride + row);
      }
    }
  });
}

void prefill_gate_up(ThreadPool& pool, const Kernels& kernels, const GemmKernels& gemm,
                     const LayerWeights& layer, const PackedInput& x, float* out,
                     CpuWorkspace& workspace) {
  const int64_t n = layer.gate.rows;
  const int64_t step = gemm_task_cols(gemm, n, pool.size());
  const std::vector<Task> tasks = gemm_tasks(gemm, x, step, {&n, 1});
  grow_gemm_scratch(pool, gemm, x, step, 2, workspace);
  pool.parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t i, int worker) {
    const Task& task = tasks[i];
    const int64_t result_rows = (task.panel1 - task.panel0) * gemm.rows;
    const int64_t first = task.panel0 * gemm.rows;
    const int64_t n_rows = std::min(result_rows, x.n_rows() - first);
    float* panel = workspace.workers[worker].as<float>();
    float* gate = panel + int64_t{kGemmSteps} * gemm.cols;
    float* up = gate + result_rows * step;
    multiply(gemm, x, layer.gate, task, panel, gate);
    multiply(gemm, x, layer.up, task, panel, up);
    for (int64_t r = 0; r < n_rows; r++) {
      for (int64_t row = task.row0; row < task.row1; row += gemm.cols) {
        const int64_t at = (row - task.row0) * result_rows + r * gemm.cols;
        kernels.silu_mul(
            gate + at, up + at, layer.gate_bias != nullptr ? layer.gate_bias + row : nullptr,
            layer.up_bias != nullptr ? layer.up_bias + row : nullptr,
            std::min<int64_t>(gemm.cols, task.row1 - row), out + (first + r) * n + row);
      }
    }
  });
}

}  // namespace mustafar
