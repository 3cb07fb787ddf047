// A random compressed cache of one sequence for the tests of the kernels, and attention over it in
// double precision.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "core/buffer.h"
#include "core/dtype.h"
#include "format/block_format.h"
#include "format/coded.h"
#include "format/pack.h"
#include "format/prune.h"

namespace mustafar::testing {

struct CacheShape {
  int32_t n_layers = 1;
  int32_t n_kv_heads = 2;
  int32_t n_queries = 2;  // per KV head
  int32_t head_dim = 64;
  DType tail = DType::kF32;
  DType values = DType::kF32;
  double k_sparsity = 0.5;
  double v_sparsity = 0.5;
  bool group_pattern = true;
  bool ragged = false;
  double k_bits = 3.0;  // coded
  double v_bits = 2.5;
  // Coded rows of other sizes in other layers: bytes of keys' and values', [n_layers] each.
  std::vector<int32_t> k_row_bytes, v_row_bytes;
};

// Normal numbers, drawn from a table: tests need many.
inline float random_normal(std::mt19937& random) {
  static const std::vector<float> table = [] {
    std::mt19937 source(12345);
    std::normal_distribution<float> normal;
    std::vector<float> numbers(1 << 16);
    for (float& x : numbers) x = normal(source);
    return numbers;
  }();
  return table[random() & 0xffff];
}

inline float rounded(float x, DType dtype) {
  uint8_t bytes[4];
  store_float(bytes, dtype, 0, x);
  return load_float(bytes, dtype, 0);
}

inline StoreLayout make_layout(const CacheShape& shape) {
  const auto slot = [&](bool is_key, double sparsity) {
    if (shape.values == DType::kCoded) {
      return make_coded_layout(shape.head_dim, is_key ? shape.k_bits : shape.v_bits);
    }
    return make_slot_layout(shape.head_dim, is_key, sparsity, shape.group_pattern, shape.values,
                            shape.ragged);
  };
  return make_store_layout(shape.n_layers, shape.n_kv_heads, slot(true, shape.k_sparsity),
                           slot(false, shape.v_sparsity));
}

// The layout, and the slots that it points to where layers differ.
struct OwnedLayout {
  std::vector<LayerSlots> layers;
  StoreLayout layout;

  explicit OwnedLayout(const CacheShape& shape) : layout(make_layout(shape)) {
    if (shape.k_row_bytes.empty()) return;
    for (size_t i = 0; i < shape.k_row_bytes.size(); i++) {
      layers.push_back({make_coded_slot(shape.head_dim, shape.k_row_bytes[i]),
                        make_coded_slot(shape.head_dim, shape.v_row_bytes[i])});
    }
    layout = make_store_layout(layers, shape.n_kv_heads);
  }
  OwnedLayout(OwnedLayout&&) = delete;
};

// Tables of coded rows for every layer and KV head: energies that fall over the dims, by turns a
// hundredfold and little.
struct RandomCodes {
  std::vector<uint8_t> widths[2];  // K, V
  std::vector<float> sigmas[2];
  CodeTables tables;

  RandomCodes(const StoreLayout& layout, uint32_t seed) {
    std::mt19937 random(seed);
    const int32_t head_dim = layout.k.head_dim;
    for (int kind = 0; kind < 2; kind++) {
      for (int32_t head = 0; head < layout.n_layers * layout.n_kv_heads; head++) {
        const float fall = head % 2 == 0 ? 4.6f : 0.5f;
        for (int32_t d = 0; d < head_dim; d++) {
          const float level = -fall * static_cast<float>(d) / static_cast<float>(head_dim);
          sigmas[kind].push_back(2.0f * std::exp(level + 0.3f * random_normal(random)));
        }
        widths[kind].resize(sigmas[kind].size());
        const int64_t at = int64_t{head} * head_dim;
        deal_widths(&sigmas[kind][at], head_dim,
                    slot_of(layout, head / layout.n_kv_heads, kind == 0).row_bytes,
                    &widths[kind][at]);
      }
    }
    tables = {widths[0].data(), widths[1].data(), sigmas[0].data(), sigmas[1].data()};
  }
  RandomCodes(RandomCodes&&) = delete;
};

// Every byte that the kernels must not depend on is 0xff: a NaN in every type.
class RandomCache {
 public:
  static constexpr int32_t kCodedPages = 5;

  // dense_tokens: valid before the call, the new token comes after them.
  RandomCache(const CacheShape& shape, int32_t n_blocks, int32_t dense_tokens, uint32_t seed,
              float key_scale = 1.0f)
      : shape_(shape), owned_(shape), layout_(owned_.layout), random_(seed) {
    if (shape.values == DType::kCoded) codes_ = std::make_unique<RandomCodes>(layout_, seed);
    const int64_t slab = layout_.page_bytes * n_blocks + kSlabSlack;
    pages_memory_ = HostBuffer(slab);
    std::memset(pages_memory_.data(), 0xff, slab);
    const int32_t capacity = dense_tokens + 3;
    const int64_t row_bytes = dtype_bytes(shape.tail, shape.head_dim);
    const int64_t dense_bytes =
        int64_t{shape.n_layers} * 2 * shape.n_kv_heads * capacity * row_bytes;
    dense_ = HostBuffer(dense_bytes);
    std::memset(dense_.data(), 0xff, dense_bytes);

    std::vector<float> rows(size_t{kBlockTokens} * shape.head_dim);
    std::vector<uint32_t> masks(size_t{kBlockTokens} * ((shape.head_dim + 31) / 32));
    for (int32_t b = 0; b < n_blocks; b++) {
      uint8_t* page = pages_memory_.as<uint8_t>() + b * layout_.page_bytes;
      pages_.push_back(page);
      if (shape.values == DType::kCoded && b >= kCodedPages) {  // slow to pack: they come again
        std::memcpy(page, pages_[b - kCodedPages], layout_.page_bytes);
        continue;
      }
      for (int32_t i = 0; i < shape.n_layers * shape.n_kv_heads; i++) {
        const int32_t layer = i / shape.n_kv_heads, head = i % shape.n_kv_heads;
        for (const bool is_key : {true, false}) {
          const SlotLayout& slot = slot_of(layout_, layer, is_key);
          for (float& x : rows) {
            x = rounded(random_normal(random_) * (is_key ? key_scale : 1.0f), shape.tail);
          }
          if (slot.ragged) {
            select_per_channel(slot, rows.data(), nullptr, masks.data());
          } else if (!slot.dense) {
            for (int32_t t = 0; t < kBlockTokens; t++) {
              select_row(slot, rows.data() + t * shape.head_dim, nullptr,
                         masks.data() + t * slot.mask_words);
            }
          }
          if (codes_ != nullptr) {
            const CodeTable table = code_table(codes_->tables, layout_, layer, head, is_key);
            for (int32_t i = 0; i < kBlockTokens * shape.head_dim; i++) {
              rows[i] = rounded(rows[i] * table.sigmas[i % shape.head_dim], shape.tail);
            }
            pack_coded_block(slot, table, rows.data(),
                             page + (is_key ? k_slot_offset(layout_, layer, head)
                                            : v_slot_offset(layout_, layer, head)));
            continue;
          }
          pack_block(slot, rows.data(), masks.data(),
                     page + (is_key ? k_slot_offset(layout_, layer, head)
                                    : v_slot_offset(layout_, layer, head)));
        }
      }
    }
    for (int32_t plane = 0; plane < shape.n_layers * 2 * shape.n_kv_heads; plane++) {
      const bool is_key = plane / shape.n_kv_heads % 2 == 0;
      for (int32_t i = 0; i < (dense_tokens + 1) * shape.head_dim; i++) {
        store_float(dense_.data(), shape.tail, int64_t{plane} * capacity * shape.head_dim + i,
                    random_normal(random_) * (is_key ? key_scale : 1.0f));
      }
    }
    step_.n_rows = 1;
    step_.layout = &layout_;
    step_.pages = pages_.data();
    step_.n_blocks = n_blocks;
    step_.dense = dense_.as<uint8_t>();
    step_.dense_capacity = capacity;
    step_.dense_tokens = dense_tokens;
    if (codes_ != nullptr) step_.codes = codes_->tables;
  }
  RandomCache(RandomCache&&) = delete;

  // Makes the store n_blocks long: its blocks over and over, in the same memory.
  void repeat_blocks(int32_t n_blocks) {
    const size_t n = pages_.size();
    for (int32_t b = static_cast<int32_t>(n); b < n_blocks; b++) pages_.push_back(pages_[b % n]);
    step_.pages = pages_.data();
    step_.n_blocks = n_blocks;
  }

  const CacheShape& shape() const { return shape_; }
  const StoreLayout& layout() const { return layout_; }
  SequenceStep& step() { return step_; }
  uint8_t* page(int32_t block) { return const_cast<uint8_t*>(pages_[block]); }
  int32_t kv_len() const { return step_.n_blocks * kBlockTokens + step_.dense_tokens + 1; }

  // Dequantised masked row of a token, in the order of the softmax: store, then dense buffer.
  std::vector<float> row(int32_t layer, int32_t head, bool is_key, int32_t token) const {
    std::vector<float> out(shape_.head_dim);
    if (token < step_.n_blocks * kBlockTokens) {
      const uint8_t* page = pages_[token / kBlockTokens];
      if (codes_ != nullptr) {
        unpack_coded_row(slot_of(layout_, layer, is_key),
                         code_table(codes_->tables, layout_, layer, head, is_key),
                         page + (is_key ? k_slot_offset(layout_, layer, head)
                                        : v_slot_offset(layout_, layer, head)),
                         token % kBlockTokens, out.data());
        return out;
      }
      unpack_row(slot_of(layout_, layer, is_key),
                 page + (is_key ? k_slot_offset(layout_, layer, head)
                                : v_slot_offset(layout_, layer, head)),
                 token % kBlockTokens, out.data());
      return out;
    }
    const int64_t at = ((int64_t{layer} * 2 + (is_key ? 0 : 1)) * shape_.n_kv_heads + head) *
                           step_.dense_capacity +
                       (token - step_.n_blocks * kBlockTokens);
    for (int32_t d = 0; d < shape_.head_dim; d++) {
      out[d] = load_float(dense_.data(), shape_.tail, at * shape_.head_dim + d);
    }
    return out;
  }

  // Makes the cache one whose store has dropped its oldest blocks; whose sinks, whose newest token
  // at step().pos0, lead the dense buffer.
  void place(int32_t n_sinks, int32_t dropped_blocks) {
    step_.n_sinks = n_sinks;
    step_.dropped_blocks = dropped_blocks;
    step_.pos0 = (dropped_blocks + step_.n_blocks) * kBlockTokens + step_.dense_tokens;
  }
  // In the sequence, of a token that row() takes.
  int32_t position(int32_t token) const {
    const int32_t in_dense = token - step_.n_blocks * kBlockTokens;
    const int32_t stored = (step_.dropped_blocks + step_.n_blocks) * kBlockTokens;
    if (in_dense < 0) return step_.n_sinks + step_.dropped_blocks * kBlockTokens + token;
    return in_dense < step_.n_sinks ? in_dense : stored + in_dense;
  }

  // Attention of one row of queries q [n_heads * head_dim], in double precision. skip: a token left
  // out, for tests that must notice it.
  std::vector<double> attend(int32_t layer, const float* q, int32_t skip = -1) const {
    return attend_to(layer, q, [skip](int32_t token) { return token != skip; });
  }

  // The same over the tokens for which sees(token) is true.
  template <class Sees>
  std::vector<double> attend_to(int32_t layer, const float* q, Sees&& sees) const {
    const int32_t head_dim = shape_.head_dim;
    std::vector<double> out(size_t{static_cast<size_t>(shape_.n_kv_heads)} * shape_.n_queries *
                            head_dim);
    for (int32_t head = 0; head < shape_.n_kv_heads; head++) {
      std::vector<double> max(shape_.n_queries, -INFINITY), sum(shape_.n_queries, 0.0);
      for (int32_t t = 0; t < kv_len(); t++) {
        if (!sees(t)) continue;
        const std::vector<float> k = row(layer, head, true, t);
        const std::vector<float> v = row(layer, head, false, t);
        for (int32_t i = 0; i < shape_.n_queries; i++) {
          const int64_t at = (int64_t{head} * shape_.n_queries + i) * head_dim;
          double score = 0;
          for (int32_t d = 0; d < head_dim; d++) score += double{q[at + d]} * k[d];
          score /= std::sqrt(static_cast<double>(head_dim));
          if (score > max[i]) {
            const double rescale = std::exp(max[i] - score);
            for (int32_t d = 0; d < head_dim; d++) out[at + d] *= rescale;
            sum[i] *= rescale;
            max[i] = score;
          }
          const double p = std::exp(score - max[i]);
          sum[i] += p;
          for (int32_t d = 0; d < head_dim; d++) out[at + d] += p * v[d];
        }
      }
      for (int32_t i = 0; i < shape_.n_queries; i++) {
        const int64_t at = (int64_t{head} * shape_.n_queries + i) * head_dim;
        for (int32_t d = 0; d < head_dim; d++) out[at + d] /= sum[i];
      }
    }
    return out;
  }

 private:
  CacheShape shape_;
  OwnedLayout owned_;
  const StoreLayout& layout_;
  std::unique_ptr<RandomCodes> codes_;
  std::mt19937 random_;
  HostBuffer pages_memory_;
  std::vector<const uint8_t*> pages_;
  HostBuffer dense_;
  SequenceStep step_;
};

// Normalised mean squared error; infinite where something is not finite.
inline double nmse(const std::vector<double>& expected, const float* actual) {
  double error = 0, power = 0;
  for (size_t i = 0; i < expected.size(); i++) {
    error += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    power += expected[i] * expected[i];
  }
  return std::isfinite(error) ? error / power : INFINITY;
}

inline double nmse_bound(DType tail, DType values) {
  const auto bound = [](DType dtype) {
    return dtype == DType::kF32 ? 1e-10 : dtype == DType::kF16 ? 1e-6 : 1e-5;
  };
  return std::max(bound(tail), bound(values));
}

// Normalised mean squared error that queries and weights of one byte may add
// (DecodeAttentionArgs::fine).
constexpr double kCoarseBound = 1e-3;

}  // namespace mustafar::testing
