// The value side of the decode kernel: the running softmax, and O^T += V^T P^T.
// decode_attention.cuh says which lane owns what.
#pragma once

#include "cuda/device_ops.cuh"
#include "cuda/matrix_ops.cuh"

namespace mustafar::cuda {

// One warp's running softmax of 4 queries: lane (g, c) has queries 2c % 4 and 2c % 4 + 1.
template <int kTiles>
struct Softmax {
  float max[2] = {-INFINITY, -INFINITY};  // over all lanes
  float sum[2] = {0.0f, 0.0f};            // this lane's tokens
  float out[kTiles][4] = {};              // O^T fragments, columns 4-7 to be added to 0-3
};

// Tokens all of which are seen.
struct NoneHidden {
  static constexpr bool kAny = false;
};

// How far, in base 2, a score may exceed the maximum that P is relative to: most tiles then leave
// it and what has been summed alone, and P stays below 2^8.
constexpr float kMaxSlack = 8.0f;
// The maximum of a warp that has seen no token yet, all of its first 16 being hidden.
constexpr float kLeastMax = -1e30f;

// Folds 16 tokens into the softmax and leaves P^T as B fragments of kType. log_scale: of V's scale
// per token where kScaled, else 0: P carries it. kTerms: of P; with one, columns 4-7 repeat 0-3.
// hidden: only of its first 16 tokens may some be. Those always raise the maximum, so that the
// others need not ask.
template <DType kType, bool kScaled, int kTerms = 2, int kTiles, typename Hidden = NoneHidden>
__device__ __forceinline__ void update_softmax(const float (&s)[4], const float (&log_scale)[2],
                                               Softmax<kTiles>& softmax, uint32_t (&b)[2],
                                               const Hidden& hidden = {}) {
  float score[4], scaled[4], top[2], p[4];
#pragma unroll
  for (int n = 0; n < 2; n++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      score[2 * i + n] = s[2 * i + n];
      scaled[2 * i + n] = kScaled ? s[2 * i + n] + log_scale[i] : s[2 * i + n];
    }
    top[n] = fmaxf(scaled[n], scaled[2 + n]);
  }
  if (ballot(top[0] > softmax.max[0] + kMaxSlack || top[1] > softmax.max[1] + kMaxSlack) != 0) {
    if constexpr (Hidden::kAny) {
      if (hidden.any()) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
          for (int i = 0; i < 2; i++) {
            if (hidden.hides(i)) score[2 * i + n] = scaled[2 * i + n] = -INFINITY;
          }
          top[n] = fmaxf(fmaxf(scaled[n], scaled[2 + n]), kLeastMax);
        }
      }
    }
    float rescale[2];
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
      for (int m = 4; m <= 16; m *= 2) top[n] = fmaxf(top[n], shuffle_xor(top[n], m));
      top[n] = fmaxf(top[n], softmax.max[n]);
      rescale[n] = exp2_approx(softmax.max[n] - top[n]);
      softmax.max[n] = top[n];
      softmax.sum[n] *= rescale[n];
    }
#pragma unroll
    for (int t = 0; t < kTiles; t++) {
#pragma unroll
      for (int i = 0; i < 4; i++) softmax.out[t][i] *= rescale[i & 1];
    }
  }
#pragma unroll
  for (int n = 0; n < 2; n++) {
    const float max = softmax.max[n];
    p[n] = exp2_approx(scaled[n] - max);
    p[2 + n] = exp2_approx(scaled[2 + n] - max);
    softmax.sum[n] +=
        kScaled ? exp2_approx(score[n] - max) + exp2_approx(score[2 + n] - max) : p[n] + p[2 + n];
  }
  [[maybe_unused]] const bool low = (lane_id() & 2) != 0;
#pragma unroll
  for (int j = 0; j < 2; j++) {
    uint32_t word = pack2<kType>(p[2 * j], p[2 * j + 1]);
    if constexpr (kTerms == 2) {
      const float high[2] = {half_float<kType>(static_cast<uint16_t>(word)),
                             half_float<kType>(static_cast<uint16_t>(word >> 16))};
      if (low) word = pack2<kType>(p[2 * j] - high[0], p[2 * j + 1] - high[1]);
    }
    b[j] = transpose_8x8(word);
  }
}

// O^T += V^T P^T for every set of queries: words[t][i] holds dims 2i, 2i + 1 of the lane's token t.
template <DType kType, int kSets, int kTiles>
__device__ __forceinline__ void add_values(const uint32_t (&words)[4][kTiles],
                                           const uint32_t (&b)[kSets][2],
                                           Softmax<kTiles> (&softmax)[kSets]) {
#pragma unroll
  for (int i = 0; i < kTiles; i++) {
    const uint32_t a[4] = {byte_permute(words[0][i], words[1][i], 0x5410),
                           byte_permute(words[0][i], words[1][i], 0x7632),
                           byte_permute(words[2][i], words[3][i], 0x5410),
                           byte_permute(words[2][i], words[3][i], 0x7632)};
#pragma unroll
    for (int set = 0; set < kSets; set++) mma_16x8x16<kType>(softmax[set].out[i], a, b[set]);
  }
}

// Biased codes (code + 128, a byte each) as f16 values: 0x6400 | u is 1024 + u.
template <int kWords>
__device__ __forceinline__ void codes_to_f16(const uint32_t (&bytes)[kWords],
                                             uint32_t (&halves)[2 * kWords]) {
#pragma unroll
  for (int i = 0; i < kWords; i++) {
    constexpr uint32_t k1152 = 0x64806480u;
    halves[2 * i] = subtract_f16x2(byte_permute(bytes[i], 0x64646464u, 0x4140), k1152);
    halves[2 * i + 1] = subtract_f16x2(byte_permute(bytes[i], 0x64646464u, 0x4342), k1152);
  }
}

}  // namespace mustafar::cuda
