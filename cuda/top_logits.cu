// The k largest of a row of logits, chunk by chunk: every block sorts kTopChunk keys in shared
// memory and leaves its k largest; rounds of that follow until one block is left, which writes the
// result. A key is the float in an order of unsigned integers, then the complement of its index, so
// that all keys differ and ties fall to the lower id.
//
// Grid: x chunk, y row; 256 threads. Shared: keys [kTopChunk], then a float and an int a warp.
// Scratch: two arrays of keys [n][chunks of the row * k], then a partial per row and chunk.
#include "cuda/device_ops.cuh"
#include "cuda/launch.cuh"
#include "cuda/top_logits.h"

namespace mustafar::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kShared = kTopChunk * 8 + kWarps * 8;

// Of one chunk of logits.
struct Partial {
  float max, exp_sum;
  int32_t bad;  // NaN or +Inf seen
  int32_t unused;
};

int64_t n_chunks(int64_t count) { return (count + kTopChunk - 1) / kTopChunk; }

__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }

__device__ __forceinline__ uint64_t key_of(float x, int32_t id) {
  const uint32_t u = float_bits(x + 0.0f);  // -0 becomes +0
  const uint32_t order = u ^ ((u >> 31) != 0 ? 0xffffffffu : 0x80000000u);
  return uint64_t{order} << 32 | ~static_cast<uint32_t>(id);
}

__device__ __forceinline__ TopPair pair_of(uint64_t key) {
  const uint32_t order = static_cast<uint32_t>(key >> 32);
  const uint32_t u = order ^ ((order >> 31) != 0 ? 0x80000000u : 0xffffffffu);
  return {bits_float(u), static_cast<int32_t>(~static_cast<uint32_t>(key))};
}

// The k largest of keys [kTopChunk] to its front, descending, by the whole block. Ends with a
// barrier.
__device__ void sort_top(uint64_t* keys, int32_t k) {
  if (k == 1) {
    uint64_t best = 0;
    for (int i = thread(); i < kTopChunk; i += kThreads) best = keys[i] > best ? keys[i] : best;
    for (int m = 16; m > 0; m >>= 1) {
      const uint64_t other = shuffle_xor(best, m);
      best = other > best ? other : best;
    }
    sync_block();  // all have read
    if (lane_id() == 0) keys[thread() / kWarpSize] = best;
    sync_block();
    if (thread() == 0) {
      for (int w = 1; w < kWarps; w++) best = keys[w] > best ? keys[w] : best;
      keys[0] = best;
    }
    sync_block();
    return;
  }
  for (int size = 2; size <= kTopChunk; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      for (int pair = thread(); pair < kTopChunk / 2; pair += kThreads) {
        const int i = 2 * pair - (pair & (stride - 1)), j = i + stride;
        const uint64_t a = keys[i], b = keys[j];
        if ((a < b) == ((i & size) == 0)) {
          keys[i] = b;
          keys[j] = a;
        }
      }
      sync_block();
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    top_chunk_kernel(const float* logits, int64_t vocab, int32_t k, uint64_t* out,
                     Partial* partials) {
  uint64_t* keys = reinterpret_cast<uint64_t*>(shared_memory());
  float* floats = reinterpret_cast<float*>(keys + kTopChunk);
  int32_t* flags = reinterpret_cast<int32_t*>(floats + kWarps);
  const int64_t row = blockIdx.y, first = int64_t{blockIdx.x} * kTopChunk;
  const float* from = logits + row * vocab + first;
  const int n = static_cast<int>(vocab - first < kTopChunk ? vocab - first : kTopChunk);
  float max = -INFINITY;
  bool bad = false;
  for (int i = thread(); i < kTopChunk; i += kThreads) {
    const float x = i < n ? from[i] : -INFINITY;
    bad = bad || !(x < INFINITY);
    max = fmaxf(max, x);
    keys[i] = i < n ? key_of(x, static_cast<int32_t>(first) + i) : 0;
  }
  max = warp_max(max);
  const bool any_bad = ballot(bad) != 0;
  const int warp = thread() / kWarpSize;
  if (lane_id() == 0) {
    floats[warp] = max;
    flags[warp] = any_bad ? 1 : 0;
  }
  sync_block();
  int32_t n_bad = 0;
  for (int w = 0; w < kWarps; w++) {
    max = fmaxf(max, floats[w]);
    n_bad += flags[w];
  }
  sync_block();  // sums take the place of the maxima
  float sum = 0.0f;
  if (max > -INFINITY && n_bad == 0) {
    for (int i = thread(); i < n; i += kThreads) sum += expf(from[i] - max);
  }
  sum = warp_sum(sum);
  if (lane_id() == 0) floats[warp] = sum;
  sort_top(keys, k);
  uint64_t* to = out + (row * gridDim.x + blockIdx.x) * k;
  for (int i = thread(); i < k; i += kThreads) to[i] = keys[i];
  if (thread() == 0) {
    for (int w = 1; w < kWarps; w++) sum += floats[w];
    partials[row * gridDim.x + blockIdx.x] = {max, sum, n_bad, 0};
  }
}

// Leaves of every chunk of a row's `count` candidates the k largest, gridDim.x * k a row. With
// result (one block serves a row then) writes the row's result instead.
__global__ void __launch_bounds__(kThreads)
    top_merge_kernel(const uint64_t* candidates, int64_t count, int32_t k, uint64_t* out,
                     const Partial* partials, int32_t n_partials, uint8_t* result) {
  uint64_t* keys = reinterpret_cast<uint64_t*>(shared_memory());
  const int64_t row = blockIdx.y, first = int64_t{blockIdx.x} * kTopChunk;
  for (int i = thread(); i < kTopChunk; i += kThreads) {
    keys[i] = first + i < count ? candidates[row * count + first + i] : 0;
  }
  sync_block();
  sort_top(keys, k);
  if (result == nullptr) {
    uint64_t* to = out + (row * gridDim.x + blockIdx.x) * k;
    for (int i = thread(); i < k; i += kThreads) to[i] = keys[i];
    return;
  }
  uint8_t* to = result + row * (sizeof(TopSummary) + k * sizeof(TopPair));
  TopPair* pairs = reinterpret_cast<TopPair*>(to + sizeof(TopSummary));
  for (int i = thread(); i < k; i += kThreads) pairs[i] = pair_of(keys[i]);
  if (thread() >= kWarpSize) return;
  const float top = pair_of(keys[0]).value;
  float sum = 0.0f;
  bool bad = false;
  for (int i = lane_id(); i < n_partials; i += kWarpSize) {
    const Partial& p = partials[row * n_partials + i];
    bad = bad || p.bad != 0;
    if (p.max > -INFINITY) sum += p.exp_sum * expf(p.max - top);
  }
  sum = warp_sum(sum);
  const bool any_bad = ballot(bad) != 0;
  if (lane_id() == 0) {
    TopSummary* summary = reinterpret_cast<TopSummary*>(to);
    summary->exp_sum = sum;
    summary->regular = !any_bad && top > -INFINITY ? 1 : 0;
  }
}

}  // namespace

int64_t top_logits_scratch_bytes(int64_t n, int64_t vocab, int32_t k) {
  const int64_t chunks = n_chunks(vocab);
  const int64_t keys = chunks * k + n_chunks(chunks * k) * k;
  return n * (keys * 8 + chunks * static_cast<int64_t>(sizeof(Partial)));
}

void top_logits(const float* logits, int64_t n, int64_t vocab, int32_t k, void* scratch, void* out,
                Stream stream) {
  const int64_t chunks = n_chunks(vocab);
  uint64_t* from = static_cast<uint64_t*>(scratch);
  uint64_t* to = from + n * chunks * k;
  Partial* partials = reinterpret_cast<Partial*>(to + n * n_chunks(chunks * k) * k);
  launch("top_chunk", top_chunk_kernel, {chunks, n}, kThreads, kShared, stream, logits, vocab, k,
         from, partials);
  for (int64_t count = chunks * k;;) {
    const int64_t blocks = n_chunks(count);
    launch("top_merge", top_merge_kernel, {blocks, n}, kThreads, kShared, stream, from, count, k,
           to, partials, static_cast<int32_t>(chunks),
           static_cast<uint8_t*>(blocks == 1 ? out : nullptr));
    if (blocks == 1) return;
    count = blocks * k;
    uint64_t* const next = from;
    from = to;
    to = next;
  }
}

}  // namespace mustafar::cuda
