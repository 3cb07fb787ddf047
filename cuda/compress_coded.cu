// Coded rows (format/coded.h), a warp per row, byte for byte as pack_coded_block writes them.
//
// Grid and rows as in compress.cu. The format sums a row as 16 partial sums of dims i mod 16; so
// lane i has dims i % 16, 16 + i % 16, ..., and the half warps share the work by the scales: the
// lower tries the first four, the upper the others. Codes gather in shared memory, from where every
// word of the row is put together by one lane.
//
// Shared: the head's table, six words a dim; for every word of a row the first dim that reaches
// into it; per warp the codes of a row, a word each.
// Limit: head_dim <= 256.
#include "cuda/coded_rows.cuh"
#include "cuda/compress.h"
#include "cuda/compress_ops.cuh"
#include "cuda/launch.cuh"

namespace mustafar::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kTableWords = 6;  // of a dim

// A head's table, [head_dim] each: CodeRow of the format, and where codes lie.
struct CodedTable {
  float* inverse_sigma;
  float* step;
  float* inverse_step;
  float* half;
  float* top;
  uint32_t* first_bit;

  __device__ __forceinline__ CodedTable(uint8_t* memory, int32_t head_dim)
      : inverse_sigma(reinterpret_cast<float*>(memory)),
        step(inverse_sigma + head_dim),
        inverse_step(step + head_dim),
        half(inverse_step + head_dim),
        top(half + head_dim),
        first_bit(reinterpret_cast<uint32_t*>(top + head_dim)) {}
};

__device__ __forceinline__ float inverse_of(float x) {
  return x >= kLeastScale ? divide_rounded(1.0f, x) : 0.0f;
}

// By a whole warp.
__device__ void load_table(const CodeTable& from, int32_t head_dim, const CodedTable& table) {
  for_code_dims(from, head_dim, [&](int32_t d, uint32_t width, uint32_t first_bit) {
    const float sigma = from.sigmas[d];
    const float step = multiply_rounded(coded_step(static_cast<int32_t>(width)), sigma);
    table.inverse_sigma[d] = inverse_of(sigma);
    table.step[d] = step;
    table.inverse_step[d] = inverse_of(step);
    table.half[d] = static_cast<float>(1u << width) * 0.5f;
    table.top[d] = static_cast<float>((1u << width) - 1u);
    table.first_bit[d] = first_bit;
  });
}

__device__ __forceinline__ float code_of(float in_steps, float inverse, float half, float top) {
  return fminf(fmaxf(add_rounded(multiply_rounded(in_steps, inverse), half), 0.0f), top);
}

// The sum of a half warp's partial sums, added in the format's order.
__device__ __forceinline__ float total_of(float partial) {
#pragma unroll
  for (int m = kSumLanes / 2; m > 0; m /= 2) {
    partial = add_rounded(partial, shuffle_xor(partial, m));
  }
  return partial;
}

template <int kChoice>
__device__ __forceinline__ float scale_factor() {
  constexpr float kFactor = kScaleFactors[kChoice];
  return kFactor;
}

// This half warp's scales, from number kChoice on: the best goes to bits, its error to least.
template <int kTerms, int kChoice>
__device__ __forceinline__ void try_scales(const CodedTable& table, int32_t n,
                                           const float (&x)[kTerms], float rms, float inverse_rms,
                                           float& least, uint16_t& best) {
  if constexpr (kChoice < kScaleChoices / 2) {
    const int lane = lane_id();
    const float factor =
        lane < kSumLanes ? scale_factor<kChoice>() : scale_factor<kScaleChoices / 2 + kChoice>();
    const uint16_t bits = float_bf16(multiply_rounded(rms, factor));
    const float scale = bf16_float(bits), inverse = inverse_of(scale);
    const float ratio = multiply_rounded(scale, inverse_rms);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kTerms; j++) {
      const int d = kSumLanes * j + lane % kSumLanes;
      if (d >= n) continue;
      const float half = table.half[d];
      const float in_steps = multiply_rounded(x[j], table.inverse_step[d]);
      const float code =
          static_cast<float>(static_cast<int32_t>(code_of(in_steps, inverse, half, table.top[d])));
      const float level = add_rounded(code, -add_rounded(half, -0.5f));
      const float coded = multiply_rounded(multiply_rounded(level, table.step[d]), ratio);
      const float error = add_rounded(multiply_rounded(x[j], inverse_rms), -coded);
      const float square = multiply_rounded(error, error);
      sum = add_rounded(sum, multiply_rounded(square, square));
    }
    sum = total_of(sum);
    if (sum < least) {
      least = sum;
      best = bits;
    }
    try_scales<kTerms, kChoice + 1>(table, n, x, rms, inverse_rms, least, best);
  }
}

// bf16 bits, the same in every lane; Inf or NaN where the row has no finite root mean square.
template <int kTerms>
__device__ __forceinline__ uint16_t choose_scale(const CodedTable& table, int32_t n,
                                                 const float (&x)[kTerms]) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kTerms; j++) {
    const int d = kSumLanes * j + lane_id() % kSumLanes;
    if (d >= n) continue;
    const float u = multiply_rounded(x[j], table.inverse_sigma[d]);
    sum = add_rounded(sum, multiply_rounded(u, u));
  }
  const float rms = sqrt_rounded(divide_rounded(total_of(sum), static_cast<float>(n)));
  uint16_t best = float_bf16(rms);
  if ((best & 0x7f80u) == 0x7f80u) return best;
  float least = INFINITY;
  try_scales<kTerms, 0>(table, n, x, rms, inverse_of(rms), least, best);
  // Of equally good scales the first counts: the lower half has the first ones.
  const float least_above = shuffle(least, lane_id() | kSumLanes);
  const uint32_t best_above = shuffle(uint32_t{best}, lane_id() | kSumLanes);
  const uint32_t chosen = least_above < least ? best_above : best;
  return static_cast<uint16_t>(shuffle(chosen, lane_id() % kSumLanes));
}

template <int kTerms>
__device__ void compress_row(const CompressArgs& args, const SlotLayout& slot,
                             const CodedTable& table, const int32_t* first_dims, const uint8_t* row,
                             uint8_t* out, int32_t index, uint32_t* codes, int32_t bad_code) {
  const int lane = lane_id();
  const int32_t n = slot.head_dim;
  float x[kTerms];
#pragma unroll
  for (int j = 0; j < kTerms; j++) {
    const int d = kSumLanes * j + lane % kSumLanes;
    x[j] = d < n ? load_element(row, args.tail_dtype, d) : 0.0f;
  }
  const uint16_t bits = choose_scale<kTerms>(table, n, x);
  if (lane == 0) {
    if ((bits & 0x7f80u) == 0x7f80u) atomic_minimum(args.bad_row, bad_code);
    reinterpret_cast<uint16_t*>(out + slot.scales_offset)[index] = bits;
  }
  const float inverse = inverse_of(bf16_float(bits));
#pragma unroll
  for (int j = 0; j < kTerms; j++) {
    const int d = kSumLanes * j + lane % kSumLanes;
    if (d >= n || lane >= kSumLanes) continue;
    const float in_steps = multiply_rounded(x[j], table.inverse_step[d]);
    codes[d] = static_cast<uint32_t>(
        static_cast<int32_t>(code_of(in_steps, inverse, table.half[d], table.top[d])));
  }
  sync_warp();
  uint32_t* words = reinterpret_cast<uint32_t*>(out + slot.values_offset + index * slot.row_bytes);
  for (int32_t i = lane; i < slot.row_bytes / 4; i += kWarpSize) {
    uint32_t word = 0;
    for (int32_t d = first_dims[i]; d < n; d++) {
      const int32_t at = static_cast<int32_t>(table.first_bit[d]) - 32 * i;
      if (at >= 32) break;
      word |= at >= 0 ? codes[d] << at : codes[d] >> -at;
    }
    words[i] = word;
  }
  sync_warp();  // the next row's codes come over these
}

template <int kTerms>
__global__ void __launch_bounds__(kWarps* kWarpSize) compress_coded_kernel(CompressArgs args) {
  const CommitView& step = args.steps[blockIdx.z];
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  if (!has_new_block(step, block)) return;
  const SlotPlace at = slot_place(args, step, block, static_cast<int32_t>(blockIdx.y));
  const SlotLayout& slot = at.kind == kKeys ? args.layout.k : args.layout.v;
  const int32_t n = slot.head_dim, n_words = slot.row_bytes / 4;
  const CodedTable table(shared_memory(), n);
  int32_t* first_dims = reinterpret_cast<int32_t*>(table.first_bit + n);  // [n_words]
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  uint32_t* codes = reinterpret_cast<uint32_t*>(first_dims + n_words) + warp * n;
  if (warp == 0) {
    const CodeTables& tables = step.sequence.codes;
    load_table(code_table(tables, args.layout, at.layer, at.head, at.kind == kKeys), n, table);
  }
  sync_block();
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < n_words; i += kWarps * kWarpSize) {
    int32_t d = 0;  // the last dim that starts at the word's first bit or before
    while (d + 1 < n && table.first_bit[d + 1] <= static_cast<uint32_t>(32 * i)) d++;
    first_dims[i] = d;
  }
  sync_block();

  const int32_t first = step.sequence.n_sinks + block * kBlockTokens;
  for (int32_t row = warp; row < kBlockTokens; row += kWarps) {
    compress_row<kTerms>(args, slot, table, first_dims, at.run.row(first + row), at.slot, row,
                         codes, bad_row_code(step, at, first + row));
  }
  zero_padding(slot, at.slot);
}

}  // namespace

void compress_coded(const CompressArgs& args, Stream stream) {
  const int64_t head_dim = args.layout.k.head_dim;
  const Grid grid{args.max_new_blocks, int64_t{args.n_layers} * args.layout.n_kv_heads * 2,
                  args.n_steps};
  const int64_t row_bytes = args.layout.k.row_bytes > args.layout.v.row_bytes
                                ? args.layout.k.row_bytes
                                : args.layout.v.row_bytes;
  const int64_t shared = head_dim * 4 * (kTableWords + kWarps) + row_bytes;
  const auto run = [&](auto kernel) {
    launch("compress_coded", kernel, grid, kWarps * kWarpSize, shared, stream, args);
  };
  if (head_dim <= 64) {
    run(compress_coded_kernel<4>);
  } else if (head_dim <= 128) {
    run(compress_coded_kernel<8>);
  } else {
    run(compress_coded_kernel<16>);
  }
}

}  // namespace mustafar::cuda
