// The dense CPU kernels, one table per instruction set. Everything that touches many numbers goes
// through it; the code around it (cpu_backend.cc, linear/linear.cc, attention/prefill.cc) only
// splits work. Pointers to weights need the alignment of their element, all others that of a float.
#pragma once

#include <cstdint>

#include "backend/backend.h"
#include "backend/cpu/isa.h"
#include "core/dtype.h"
#include "format/block_format.h"
#include "format/coded.h"

namespace mustafar {

// Packed GEMM operands are made of 32-bit words: an f32, or two bf16 neighbours along the inner
// dimension. One word is one step of the inner product. Panels hold at most kGemmSteps steps; the
// rows of an input panel are kGemmStride words apart, which keeps them off each other's cache sets.
inline constexpr int32_t kGemmSteps = 256;
inline constexpr int32_t kGemmStride = kGemmSteps + 16;

// Keys that prefill attention takes at a time.
inline constexpr int32_t kKeyTile = 256;

// Rows of a product of a matrix with a few activation rows: y[b][r - row0] = sum_c W[r][c] x[b][c]
// + bias[r], r in [row0, row1); added to y where `add` is set.
struct ProductArgs {
  int64_t row0 = 0;
  int64_t row1 = 0;
  const float* x = nullptr;  // [batch] rows, x_stride apart
  int64_t x_stride = 0;
  int32_t batch = 0;
  const float* bias = nullptr;  // [rows] or null
  float* y = nullptr;           // [batch] rows, y_stride apart
  int64_t y_stride = 0;
  bool add = false;
};

// How a sum is ordered depends on cols alone.
struct GemvArgs : ProductArgs {
  const void* weights = nullptr;  // [rows][cols]
  DType dtype = DType::kF32;      // of the weights: f32, f16 or bf16
  int64_t cols = 0;
  // Of bf16 weights: x as Kernels::split_terms makes it, where that is not x itself.
  const void* terms = nullptr;
};

// Activations of a product with a quantised matrix, rounded to integers in groups of kInnerStep
// inputs with a scale of their own: x = scale * v. One plane holds v as int8, the largest of a
// group is 127. Two hold 15 bits, v = 128 high + low, the largest is kLargestOfTwo: no model tells
// those from f32 activations, at twice the products. Rows come in blocks of rows(), the last one of
// what is left; block of n rows: codes [inner / 4][n][planes][4], scales and sums of v
// [inner / 32][n]. A group that is not finite has codes 0 and scale NaN.
struct Int8Input {
  static constexpr int32_t kLargestOfTwo = 127 * 128;

  int8_t* codes = nullptr;
  float* scales = nullptr;
  int32_t* sums = nullptr;
  int32_t planes = 1;

  static constexpr int32_t rows(int32_t planes) { return 8 / planes; }
  int32_t rows() const { return rows(planes); }
  // The block that begins with row `row`, a multiple of rows().
  Int8Input block(int64_t row, int64_t inner) const {
    const int64_t groups = row * (inner / kInnerStep);
    return {codes + row * inner * planes, scales + groups, sums + groups, planes};
  }
};

// Planes of the activations that codes are multiplied with. Rounding those to int8 costs more than
// int8 weights do, and less than int4 weights.
inline constexpr int32_t input_planes(DType codes) { return codes == DType::kInt8 ? 2 : 1; }

// The product of a quantised matrix, of x or, rounded, of input. row0: a multiple of kTileRows. A
// product of integers is the sum over groups of
//
//   scale * (part - zero * sum), or scale * part + minimum * sum, where
//   part = sum over steps of input scale * (sum of code * v)
//   sum = sum over steps of input scale * (sum of v)
//
// with fused multiply-adds in the order of the inputs, those of the last line apart: every
// instruction set computes the same bits. The sums in brackets are exact integers.
struct QuantisedGemvArgs : ProductArgs {
  const Matrix* weights = nullptr;
  Int8Input input;
  // Of 8-bit codes: input as Kernels::tile_int8_input makes it as well, or null.
  const void* tiles = nullptr;

  void store(int64_t row, int32_t b, float sum) const {
    if (row >= row1) return;
    if (bias != nullptr) sum += bias[row];
    float& out = y[b * y_stride + (row - row0)];
    out = add ? out + sum : sum;
  }
};

// Attention of up to `rows` of GemmKernels query rows over one tile of keys: updates the online
// softmax state. Scores are in units of log2: the packed queries carry log2(e) / sqrt(head_dim).
struct AttendPanel {
  int32_t n_rows = 0;
  int32_t head_dim = 0;
  const int32_t* visible = nullptr;  // [n_rows] keys of this tile that a row sees: the first ones
  const int32_t* hidden =
      nullptr;               // [n_rows] of those, the first ones that it does not see; or null
  const float* q = nullptr;  // packed input panels, one per kGemmSteps steps of head_dim
  const float* k = nullptr;  // packed weight panels [key panels][depth panels]
  const float* v = nullptr;  // packed by pack_values: [dim panels]
  int32_t v_panel = 0;       // words between dim panels of v
  float* max = nullptr;      // [n_rows] -inf at first
  float* sum = nullptr;      // [n_rows] 0 at first
  float* out =
      nullptr;  // [rows][head_dim rounded up to cols], 0 at first; divide by sum at the end
  float* scratch = nullptr;  // [attend_scratch_words(rows)]
};

struct GemmKernels {
  int32_t rows = 0;            // of an input panel and a result tile
  int32_t cols = 0;            // of a weight panel (outputs) and a result tile
  int32_t unit = 0;            // inner elements per step: 1 (f32) or 2 (bf16)
  int32_t depth = kGemmSteps;  // steps at which tile runs best, a divisor of kGemmSteps
  int32_t task_cols = 0;       // outputs per task while there are enough tasks, a multiple of cols

  // Input panel [rows][kGemmStride] of n_rows <= rows rows of n <= kGemmSteps * unit elements, each
  // multiplied by scale. Rows above n_rows are left as they are.
  void (*pack_input)(const float* x, int64_t stride, int32_t n_rows, int32_t n, float scale,
                     float* out) = nullptr;
  // Weight panel [steps][cols] of n_rows <= cols rows (outputs) of n elements; the rest is zero.
  void (*pack_weights)(const void* w, DType dtype, int64_t stride, int32_t n_rows, int32_t n,
                       float* out) = nullptr;
  // The same from rows [row, row + n_rows) and inputs [col, col + n) of a quantised matrix, rounded
  // to the panel's type. row: a multiple of cols; col: one of kGemmSteps * unit.
  void (*pack_quantised)(const Matrix& w, int64_t row, int32_t n_rows, int64_t col, int32_t n,
                         float* out) = nullptr;
  // Weight panel of the transpose: n_rows <= kKeyTile rows become the steps, n_cols <= cols the
  // outputs. Steps up to the next that attend takes at a time are zero.
  void (*pack_values)(const void* w, DType dtype, int64_t stride, int32_t n_rows, int32_t n_cols,
                      float* out) = nullptr;
  // c [n_rows rounded up to at most rows][cols], c_stride apart, = or += input panel x weight
  // panel.
  void (*tile)(int32_t steps, const float* input, const float* weights, int32_t n_rows, float* c,
               int64_t c_stride, bool add) = nullptr;
  void (*attend)(const AttendPanel& panel) = nullptr;

  // Readies the calling thread for tile and attend, and undoes it; null where nothing is needed.
  void (*enter)() = nullptr;
  void (*leave)() = nullptr;
};

// Between its construction and its end this thread may call tile and attend of `gemm`.
class GemmScope {
 public:
  explicit GemmScope(const GemmKernels& gemm) : leave_(gemm.leave) {
    if (gemm.enter != nullptr) gemm.enter();
  }
  ~GemmScope() {
    if (leave_ != nullptr) leave_();
  }
  GemmScope(const GemmScope&) = delete;
  GemmScope& operator=(const GemmScope&) = delete;

 private:
  void (*leave_)();
};

struct Kernels {
  // out = x / sqrt(mean(x^2) + eps) * weight.
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* out) = nullptr;
  // out = silu(gate + gate_bias) * (up + up_bias); biases may be null, out may be gate.
  void (*silu_mul)(const float* gate, const float* up, const float* gate_bias, const float* up_bias,
                   int64_t n, float* out) = nullptr;
  // out = x + bias, or out += x + bias; bias may be null.
  void (*store)(const float* x, const float* bias, int64_t n, bool add, float* out) = nullptr;
  void (*scale)(const float* x, float factor, int64_t n, float* out) = nullptr;
  // Rotates pairs (i, i + n / 2) by the angles given as cos and sin [n / 2], in place.
  void (*rope)(float* x, const float* cos, const float* sin, int32_t n) = nullptr;
  // out[j] = sum_i x[i] m[i][j], m [n][n].
  void (*multiply_row)(const float* x, const float* m, int32_t n, float* out) = nullptr;
  void (*to_f32)(const void* x, DType dtype, int64_t n, float* out) = nullptr;
  void (*from_f32)(const float* x, int64_t n, DType dtype, void* out) = nullptr;
  void (*gemv)(const GemvArgs& args) = nullptr;
  // What gemv takes the activations of bf16 weights as, made once for all tasks of a product:
  // terms_bytes(batch, cols) bytes, aligned to 64. Null, or 0 bytes, where it takes them as they
  // are.
  int64_t (*terms_bytes)(int32_t batch, int64_t cols) = nullptr;
  void (*split_terms)(const float* x, int64_t x_stride, int32_t batch, int64_t cols,
                      void* terms) = nullptr;
  // Products with quantised matrices: of f32 activations, and of int8 ones.
  void (*gemv_quantised)(const QuantisedGemvArgs& args) = nullptr;
  void (*gemv_int8_input)(const QuantisedGemvArgs& args) = nullptr;
  // Whether the latter is faster than GEMM for any number of rows, with 4-bit codes.
  bool rounds_prompts = false;
  // Row i of a block of n rows of activations, x [cols].
  void (*quantise_input)(const float* x, int64_t cols, int32_t i, int32_t n,
                         const Int8Input& block) = nullptr;
  // What gemv_int8_input takes many rows of activations as, made of what quantise_input made of
  // them: int8_tiles_bytes(batch, inner, planes) bytes, aligned to 64. Null, or 0 bytes, where it
  // takes those alone.
  int64_t (*int8_tiles_bytes)(int32_t batch, int64_t inner, int32_t planes) = nullptr;
  void (*tile_int8_input)(const Int8Input& input, int32_t batch, int64_t inner,
                          void* tiles) = nullptr;
  // One tile of rows of Backend::quantise: codes, f16 scales and minimums. scratch: [inner][16].
  bool (*quantise_tile)(const Matrix& stored, const QuantisedShape& shape, int64_t tile,
                        uint8_t* codes, uint16_t* scales, uint16_t* minimums,
                        float* scratch) = nullptr;
  // A slot of the store as f32 rows [64][head_dim], zero where pruned.
  void (*unpack_slot)(const SlotLayout& layout, const uint8_t* slot, float* out) = nullptr;
  // The largest of a row of logits (NaN is passed over) and the first index where it stands.
  void (*row_max)(const float* x, int64_t n, float* value, int64_t* index) = nullptr;
  // sum e^(x - shift), whose blocks are added in double; relative error below 1e-6.
  double (*exp_sum)(const float* x, float shift, int64_t n) = nullptr;
  // sum e^p (p - (x - shift)): the divergence of log-probabilities x - shift from p.
  double (*divergence)(const float* p, const float* x, float shift, int64_t n) = nullptr;
  // unpack_slot for coded rows, as unpack_coded_slot of format/coded.h.
  void (*unpack_coded_slot)(const SlotLayout& layout, const CodeTable& table, const uint8_t* slot,
                            float* out) = nullptr;
  GemmKernels f32;
  GemmKernels bf16;  // rows == 0 where the instruction set has no bf16 dot product
};

// Words of AttendPanel::scratch.
inline constexpr int64_t attend_scratch_words(int32_t rows) {
  return int64_t{rows} * (kKeyTile + 16 + kGemmStride);
}

// The tables. Only kernels.cc calls them, after asking the processor.
const Kernels& scalar_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const GemmKernels& avx512bf16_gemm_kernels();
const GemmKernels& amx_gemm_kernels();
// Of bf16 weights only.
void gemv_bf16_avx512bf16(const GemvArgs& args);
int64_t gemv_terms_bytes_avx512bf16(int32_t batch, int64_t cols);
void gemv_split_terms_avx512bf16(const float* x, int64_t x_stride, int32_t batch, int64_t cols,
                                 void* terms);
void gemv_bf16_amx(const GemvArgs& args);
int64_t gemv_terms_bytes_amx(int32_t batch, int64_t cols);
void gemv_split_terms_amx(const float* x, int64_t x_stride, int32_t batch, int64_t cols,
                          void* terms);
const Kernels& neon_kernels();
void gemv_int8_input_plain(const QuantisedGemvArgs& args);
void gemv_int8_input_avx2(const QuantisedGemvArgs& args);
void gemv_int8_input_avx512(const QuantisedGemvArgs& args);
void gemv_int8_input_amx(const QuantisedGemvArgs& args);
int64_t int8_tiles_bytes_amx(int32_t batch, int64_t inner, int32_t planes);
void tile_int8_input_amx(const Int8Input& input, int32_t batch, int64_t inner, void* tiles);
bool quantise_tile_plain(const Matrix& stored, const QuantisedShape& shape, int64_t tile,
                         uint8_t* codes, uint16_t* scales, uint16_t* minimums, float* scratch);
bool quantise_tile_avx2(const Matrix& stored, const QuantisedShape& shape, int64_t tile,
                        uint8_t* codes, uint16_t* scales, uint16_t* minimums, float* scratch);
bool quantise_tile_avx512(const Matrix& stored, const QuantisedShape& shape, int64_t tile,
                          uint8_t* codes, uint16_t* scales, uint16_t* minimums, float* scratch);

// Requires that the processor runs `isa`.
Kernels select_kernels(Isa isa);

}  // namespace mustafar
