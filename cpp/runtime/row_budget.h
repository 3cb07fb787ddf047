// Bytes of coded rows dealt over layers, keys and values: a layer whose errors change what the
// model says gets more of them.
//
// The heads of a layer and kind have rows of one size, whole words of 4 bytes, at least one and no
// more than coded_row_bytes(head_dim, 7). What rows of a size cost is predicted: the square error
// that deal_widths leaves in the profile's coordinates, summed over dims and heads, times the
// layer's and kind's measured cost (Profile::k_cost, v_cost). A word at a time goes where it lowers
// the prediction most; of equals, to the first layer, keys before values. Since every further word
// gains less, no other sizes of as many bytes predict less.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kv/row_sizes.h"
#include "kv/sequence_cache.h"
#include "mustafar/kv_config.h"
#include "mustafar/profile.h"

namespace mustafar {

// Sigmas [head_dim] of a profile's dims from `first` on as bits are dealt by them: a dim that was
// scaled for integers counts as it was before. weights: what it was divided by, or empty.
std::vector<float> unscaled_sigmas(const std::vector<float>& sigmas,
                                   const std::vector<float>& weights, int64_t first,
                                   int32_t head_dim);

// Of a profile with sigmas: what rows of one layer and kind leave as square error, by their size.
struct RowErrors {
  // [n_layers][2 (K, V)][words]: of rows of 1, 2, ... words, summed over dims and KV heads.
  std::vector<double> errors;
  int32_t n_words = 0;  // the largest size

  double at(int32_t layer, bool is_key, int32_t row_bytes) const {
    return errors[(int64_t{layer} * 2 + (is_key ? 0 : 1)) * n_words + row_bytes / 4 - 1];
  }
};
RowErrors row_errors(const Profile& profile);

// What a configuration that asks for a budget (KVConfig::budgeted) gets with its profile. Throws
// std::invalid_argument naming the field where the profile has no costs, or where the budget does
// not suffice for the smallest rows or the largest cost more than max_kld.
RowSizes deal_rows(const KVConfig& config);

// make_cache_spec, with the budget dealt where the configuration has one.
CacheSpec dealt_cache_spec(const ModelConfig& model, DType tail_dtype, const KVConfig& config);

}  // namespace mustafar
