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

// Rows per GEMV task: whole tiles, those of a quantised matrix or of registers; several tasks per
// thread so that a slow one is evened out.
int64_t gemv_task_rows(const Matrix& w, int threads) {
  const int64_t row_bytes = std::max<int64_t>(1, dtype_bytes(w.dtype, w.cols));
  const int64_t rows = std::min(kGemvTaskBytes / row_bytes, w.rows / (4 * threads));
  return std::max<int64_t>(kTileRows, rows / kTileRows * kTileRows);
}

// Activations as the types of matrices take them that they are multiplied with: rounded to integers
// of one plane or of two, or split into terms.
struct Inputs {
  Int8Input of_planes[2];
  const void* tiles = nullptr;  // of the integers, for 8-bit codes
  const void* terms = nullptr;

  const Int8Input& of(const Matrix& w) const { return of_planes[input_planes(w.dtype) - 1]; }
};

// Rounds x for a quantised matrix, unless that has been done for another one; in the workspace.
void round_rows(ThreadPool& pool, const Kernels& kernels, const Matrix& w, const float* x,
                int64_t x_stride, int32_t batch, CpuWorkspace& workspace, Inputs& inputs) {
  const int32_t planes = input_planes(w.dtype);
  Int8Input& input = inputs.of_planes[planes - 1];
  if (input.codes != nullptr) return;
  const int64_t cols = w.cols, inner = w.shape().inner();
  const int64_t groups = batch * (inner / kInnerStep);
  HostBuffer& buffer = workspace.int8_input[planes - 1];
  input.planes = planes;
  input.scales = grow<float>(buffer, 2 * groups + batch * inner * planes / 4);
  input.sums = reinterpret_cast<int32_t*>(input.scales + groups);
  input.codes = reinterpret_cast<int8_t*>(input.sums + groups);
  const auto row = [&](int64_t b, int) {
    const int32_t first = static_cast<int32_t>(b) / input.rows() * input.rows();
    kernels.quantise_input(x + b * x_stride, cols, static_cast<int32_t>(b) - first,
                           std::min(input.rows(), batch - first), input.block(first, inner));
  };
  pool.parallel_rows(batch, cols, row);
  if (kernels.tile_int8_input == nullptr) return;
  const int64_t bytes = kernels.int8_tiles_bytes(batch, inner, planes);
  if (bytes == 0) return;
  uint8_t* tiles = grow<uint8_t>(workspace.int8_tiles, bytes);
  kernels.tile_int8_input(input, batch, inner, tiles);
  inputs.tiles = tiles;
}

// Makes of x what a matrix is multiplied with, unless that has been done for another one.
void prepare(ThreadPool& pool, const Kernels& kernels, const Matrix& w, const float* x,
             int64_t x_stride, int32_t batch, bool int8_input, CpuWorkspace& workspace,
             Inputs& inputs) {
  if (w.quantised()) {
    if (int8_input) round_rows(pool, kernels, w, x, x_stride, batch, workspace, inputs);
  } else if (w.dtype == DType::kBF16 && kernels.split_terms != nullptr && inputs.terms == nullptr) {
    const int64_t bytes = kernels.terms_bytes(batch, w.cols);
    if (bytes == 0) return;
    uint8_t* terms = grow<uint8_t>(workspace.terms, bytes);
    kernels.split_terms(x, x_stride, batch, w.cols, terms);
    inputs.terms = terms;
  }
}

// inputs: what prepare made of the activations of `product`.
void multiply_rows(const Kernels& kernels, const Matrix& w, const ProductArgs& product,
                   const Inputs& inputs) {
  if (!w.quantised()) {
    return kernels.gemv(GemvArgs{product, w.data, w.dtype, w.cols, inputs.terms});
  }
  const QuantisedGemvArgs args{product, &w, inputs.of(w), inputs.tiles};
  args.input.codes != nullptr ? kernels.gemv_int8_input(args) : kernels.gemv_quantised(args);
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

// Where rows [row, row + n_rows) and inputs [col, col + n) of a matrix lie: lines of equal length.
// Of a quantised one these are tiles, without their scales.
struct Region {
  const uint8_t* data = nullptr;
  int64_t n_rows = 0;
  int64_t bytes = 0;
  int64_t stride_bytes = 0;

  Region(const Matrix& w, int64_t row, int64_t rows, int64_t col, int64_t n) : n_rows(rows) {
    data = static_cast<const uint8_t*>(w.data);
    if (w.quantised()) {
      const QuantisedShape shape = w.shape();
      n_rows = (row + rows + kTileRows - 1) / kTileRows - row / kTileRows;
      bytes = (n + shape.line_inputs() - 1) / shape.line_inputs() * kLineBytes;
      stride_bytes = shape.tile_code_bytes();
      data += row / kTileRows * stride_bytes + col / shape.line_inputs() * kLineBytes;
    } else {
      bytes = dtype_bytes(w.dtype, n);
      stride_bytes = dtype_bytes(w.dtype, w.cols);
      data += row * stride_bytes + dtype_bytes(w.dtype, col);
    }
  }

  // Prefetches part `i` of `parts`.
  void prefetch(int64_t i, int64_t parts) const {
    const int64_t lines = (bytes + 63) / 64, all = n_rows * lines;
    for (int64_t line = all * i / parts; line < all * (i + 1) / parts; line++) {
      __builtin_prefetch(data + line / lines * stride_bytes + line % lines * 64, 0, 2);
    }
  }
};

// result [output panel][rows of the task's input panels][gemm.cols] = x W^T for the task's rows of
// w.
void multiply(const GemmKernels& gemm, const PackedInput& x, const Matrix& w, const Task& task,
              float* panel, float* result) {
  const GemmScope scope(gemm);
  const int64_t n_panels = task.panel1 - task.panel0;
  const int64_t result_rows = n_panels * gemm.rows;
  int64_t col = 0;
  for (int64_t block = 0; block < x.n_blocks(); block++) {
    const int32_t n = x.block_cols(block);
    const int32_t steps = (n + gemm.unit - 1) / gemm.unit;
    for (int64_t row = task.row0; row < task.row1; row += gemm.cols) {
      const int32_t n_outputs = static_cast<int32_t>(std::min<int64_t>(gemm.cols, task.row1 - row));
      if (w.quantised()) {
        gemm.pack_quantised(w, row, n_outputs, col, n, panel);
      } else {
        gemm.pack_weights(Region(w, row, n_outputs, col, n).data, w.dtype, w.cols, n_outputs, n,
                          panel);
      }

      // The next panel comes from memory while this one is multiplied: the next rows or, after the
      // last ones, the next columns.
      const bool last = row + gemm.cols >= task.row1;
      const int64_t next_row = last ? task.row0 : row + gemm.cols;
      const int64_t next_rows = last && block + 1 == x.n_blocks()
                                    ? 0
                                    : std::min<int64_t>(gemm.cols, task.row1 - next_row);
      const Region next(w, next_row, next_rows, last ? col + n : col, n);

      float* c = result + (row - task.row0) * result_rows;
      for (int32_t step = 0; step < steps; step += gemm.depth) {
        const int32_t depth = std::min(gemm.depth, steps - step);
        for (int64_t p = 0; p < n_panels; p++) {
          if (step == 0) next.prefetch(p, n_panels);
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
                   const float* x, int64_t x_stride, int32_t batch, bool int8_input,
                   CpuWorkspace& workspace) {
  std::vector<Task> tasks;
  for (size_t i = 0; i < layers.size(); i++) {
    const Matrix& w = *layers[i].weights;
    split(static_cast<int32_t>(i), w.rows, gemv_task_rows(w, pool.size()), tasks);
  }
  for (int32_t first = 0; first < batch; first += kRowsAtOnce) {
    const int32_t rows = std::min(kRowsAtOnce, batch - first);
    const float* some = x + first * x_stride;
    Inputs inputs;
    for (const LinearLayer& layer : layers) {
      prepare(pool, kernels, *layer.weights, some, x_stride, rows, int8_input, workspace, inputs);
    }
    pool.parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t i, int) {
      const Task& task = tasks[i];
      const LinearLayer& layer = layers[task.layer];
      float* out = layer.out + first * layer.out_stride + task.row0;
      multiply_rows(kernels, *layer.weights,
                    {task.row0, task.row1, some, x_stride, rows, layer.bias, out, layer.out_stride,
                     layer.add},
                    inputs);
    });
  }
}

void decode_gate_up(ThreadPool& pool, const Kernels& kernels, const LayerWeights& layer,
                    const float* x, int32_t batch, float* out, bool int8_input,
                    CpuWorkspace& workspace) {
  const int64_t n = layer.gate.rows, cols = layer.gate.cols;
  const int64_t step =
      std::max(gemv_task_rows(layer.gate, pool.size()), gemv_task_rows(layer.up, pool.size()));
  workspace.workers.resize(pool.size());
  for (HostBuffer& buffer : workspace.workers) {
    grow<float>(buffer, std::min(kRowsAtOnce, batch) * step);
  }
  for (int32_t first = 0; first < batch; first += kRowsAtOnce) {
    const int32_t rows = std::min(kRowsAtOnce, batch - first);
    const float* some = x + first * cols;
    Inputs inputs;
    for (const Matrix* w : {&layer.gate, &layer.up}) {
      prepare(pool, kernels, *w, some, cols, rows, int8_input, workspace, inputs);
    }
    pool.parallel_for((n + step - 1) / step, [&](int64_t i, int worker) {
      const int64_t row0 = i * step, row1 = std::min(n, row0 + step);
      float* up = workspace.workers[worker].as<float>();  // [rows][step]
      float* gate = out + first * n + row0;
      ProductArgs product{row0, row1, some, cols, rows, nullptr, gate, n, false};
      multiply_rows(kernels, layer.gate, product, inputs);
      product.y = up;
      product.y_stride = step;
      multiply_rows(kernels, layer.up, product, inputs);
      for (int32_t b = 0; b < rows; b++) {
        kernels.silu_mul(gate + b * n, up + b * step,
                         layer.gate_bias != nullptr ? layer.gate_bias + row0 : nullptr,
                         layer.up_bias != nullptr ? layer.up_bias + row0 : nullptr, row1 - row0,
                         gate + b * n);
      }
    });
  }
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
