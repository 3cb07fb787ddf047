// What sessions of a model share, made once: pools of pages, and on the device the tables of
// profiles.
#include <stdexcept>
#include <utility>

#include "mustafar/error.h"
#include "mustafar/profile.h"
#include "runtime/model_impl.h"
#include "runtime/row_budget.h"

namespace mustafar {
namespace {

// Brings values into stored order. They are matrices [.][D][D]: with columns, each row's elements
// go to where their dims are stored; without, the rows themselves do. Weights [.][D] are rows, and
// so need columns.
std::vector<float> in_stored_order(const std::vector<float>& values, int32_t dim, int32_t n_groups,
                                   bool columns) {
  std::vector<float> out(values.size());
  const int64_t n_rows = static_cast<int64_t>(values.size()) / dim;
  for (int64_t row = 0; row < n_rows; row++) {
    const int64_t matrix = row / dim * dim;
    const int64_t to =
        columns ? row : matrix + stored_index(static_cast<int32_t>(row % dim), n_groups, dim);
    for (int32_t d = 0; d < dim; d++) {
      const int32_t column = columns ? stored_index(d, n_groups, dim) : d;
      out[to * dim + column] = values[row * dim + d];
    }
  }
  return out;
}

}  // namespace

std::shared_ptr<BlockPool> Model::Impl::pool(int64_t page_bytes) {
  std::lock_guard lock(mutex_);
  std::erase_if(pools_, [](const auto& entry) { return entry.second.expired(); });
  for (const auto& [known, pool] : pools_) {
    if (known == page_bytes) {
      if (auto live = pool.lock()) return live;
    }
  }
  auto pool = std::make_shared<BlockPool>(*backend, budget, page_bytes);
  pools_.emplace_back(page_bytes, pool);
  return pool;
}

std::shared_ptr<const Profile> Model::Impl::hadamard_profile() {
  std::lock_guard lock(mutex_);
  if (hadamard_ == nullptr) hadamard_ = Profile::hadamard(config);
  return hadamard_;
}

std::shared_ptr<const KVTransform> Model::Impl::transform(
    const std::shared_ptr<const Profile>& profile, int32_t k_groups, int32_t v_groups) {
  if (profile == nullptr && k_groups == 1 && v_groups == 1) return nullptr;
  std::lock_guard lock(mutex_);
  std::erase_if(transforms_, [](const auto& entry) { return entry.transform.expired(); });
  for (const KnownTransform& known : transforms_) {
    const auto live = known.transform.lock();
    // known.profile.lock() is null where there was no profile, and also where it has gone; only the
    // former has no matrices.
    if (live == nullptr || (live->k_forward == nullptr) != (profile == nullptr)) continue;
    if (known.profile.lock() == profile && live->k_groups == k_groups &&
        live->v_groups == v_groups) {
      if (profile != nullptr) last_transform_ = live;
      return live;
    }
  }
  if (profile != nullptr) profile->check(config, fingerprint);
  // The struct and the matrices that it points to live and die together.
  struct Uploaded {
    KVTransform view;
    std::vector<std::unique_ptr<DeviceMemory>> memory;
  };
  auto uploaded = std::make_shared<Uploaded>();
  const auto upload = [&](const std::vector<float>& values, int32_t n_groups,
                          bool columns) -> const float* {
    if (values.empty()) return nullptr;
    const std::vector<float> stored = in_stored_order(values, config.head_dim, n_groups, columns);
    const int64_t bytes = static_cast<int64_t>(stored.size()) * 4;
    uploaded->memory.push_back(backend->allocate(bytes));
    backend->upload(uploaded->memory.back()->data(), stored.data(), bytes);
    return static_cast<const float*>(uploaded->memory.back()->data());
  };
  KVTransform& view = uploaded->view;
  view.k_groups = k_groups;
  view.v_groups = v_groups;
  if (profile != nullptr) {
    view.k_forward = upload(profile->k_forward, k_groups, true);
    view.k_backward = upload(profile->k_backward, k_groups, false);
    view.v_forward = upload(profile->v_forward, v_groups, true);
    view.v_backward = upload(profile->v_backward, v_groups, false);
    view.k_weight = upload(profile->k_weight, k_groups, true);
    view.v_weight = upload(profile->v_weight, v_groups, true);
  }
  std::shared_ptr<const KVTransform> transform(uploaded, &view);
  transforms_.push_back({profile, transform});
  if (profile != nullptr) last_transform_ = transform;
  return transform;
}

std::shared_ptr<const CodeTables> Model::Impl::code_tables(const KVConfig& kv,
                                                           const StoreLayout& layout) {
  if (!kv.coded()) return nullptr;
  if (kv.profile == nullptr || kv.profile->k_sigma.empty() || kv.profile->v_sigma.empty()) {
    throw std::invalid_argument(
        std::string("profile: value_dtype \"coded\" needs one with k_sigma and v_sigma, ") +
        (kv.profile == nullptr ? "none was given"
                               : "this one of kind " + kv.profile->kind + " has none") +
        "; \"mustafar calibrate\" makes one");
  }
  if (!backend->codes()) {
    throw DeviceError("value_dtype \"coded\" is not supported on device \"" + backend->device() +
                      "\": use device \"cpu\" or another value_dtype");
  }
  std::vector<int32_t> row_bytes;
  for (int32_t i = 0; i < 2 * config.n_layers; i++) {
    row_bytes.push_back(slot_of(layout, i / 2, i % 2 == 0).row_bytes);
  }
  std::lock_guard lock(mutex_);
  std::erase_if(codes_, [](const Codes& entry) { return entry.tables.expired(); });
  for (const Codes& known : codes_) {
    if (known.profile.lock() == kv.profile && known.row_bytes == row_bytes) {
      if (auto live = known.tables.lock()) return last_codes_ = std::move(live);
    }
  }
  // The struct and the tables that it points to live and die together.
  struct Uploaded {
    CodeTables view;
    std::vector<std::unique_ptr<DeviceMemory>> memory;
  };
  auto uploaded = std::make_shared<Uploaded>();
  const auto upload = [&](const void* data, int64_t bytes) {
    uploaded->memory.push_back(backend->allocate(bytes));
    backend->upload(uploaded->memory.back()->data(), data, bytes);
    return uploaded->memory.back()->data();
  };
  const auto upload_kind = [&](const std::vector<float>& sigmas, const std::vector<float>& weights,
                               int32_t kind, const uint8_t*& device_widths,
                               const float*& device_sigmas) {
    std::vector<uint8_t> widths(sigmas.size());
    for (int32_t head = 0; head < config.n_layers * config.n_kv_heads; head++) {
      const int64_t at = int64_t{head} * config.head_dim;
      const std::vector<float> unscaled = unscaled_sigmas(sigmas, weights, at, config.head_dim);
      deal_widths(unscaled.data(), config.head_dim, row_bytes[head / config.n_kv_heads * 2 + kind],
                  widths.data() + at);
    }
    device_widths = static_cast<const uint8_t*>(upload(widths.data(), widths.size()));
    device_sigmas = static_cast<const float*>(upload(sigmas.data(), sigmas.size() * 4));
  };
  const Profile& profile = *kv.profile;
  CodeTables& view = uploaded->view;
  upload_kind(profile.k_sigma, profile.k_weight, kKeys, view.k_widths, view.k_sigmas);
  upload_kind(profile.v_sigma, profile.v_weight, kValues, view.v_widths, view.v_sigmas);
  std::shared_ptr<const CodeTables> tables(uploaded, &uploaded->view);
  codes_.push_back({kv.profile, std::move(row_bytes), tables});
  last_codes_ = tables;
  return tables;
}

std::shared_ptr<const RowSizes> Model::Impl::row_budget(const KVConfig& kv) {
  std::lock_guard lock(mutex_);
  std::erase_if(budgets_, [](const Budget& entry) { return entry.profile.expired(); });
  for (const Budget& known : budgets_) {
    if (known.profile.lock() == kv.profile && known.bytes_per_token == kv.budget_bytes_per_token &&
        known.max_kld == kv.max_kld) {
      return known.rows;
    }
  }
  if (kv.profile != nullptr) kv.profile->check(config, fingerprint);
  const auto rows = std::make_shared<const RowSizes>(deal_rows(kv));
  budgets_.push_back({kv.profile, kv.budget_bytes_per_token, kv.max_kld, rows});
  return rows;
}

std::shared_ptr<const CacheSpec> Model::Impl::cache_spec(const KVConfig& kv, const RowSizes* rows) {
  kv.validate();
  if ((kv.budgeted() || rows != nullptr) && !backend->layers_may_differ()) {
    throw DeviceError(std::string(kv.max_kld                  ? "max_kld"
                                  : kv.budget_bytes_per_token ? "budget_bytes_per_token"
                                                              : "calibration for a budget") +
                      " is not supported on device \"" + backend->device() +
                      "\", where all layers' rows are of one size: use bits, or device \"cpu\"");
  }
  std::shared_ptr<const RowSizes> dealt;
  if (kv.budgeted()) {
    dealt = row_budget(kv);
    rows = dealt.get();
  }
  CacheSpec spec = make_cache_spec(config, dtype, kv, rows);
  spec.transform = transform(kv.profile, n_groups(spec.layout.k), n_groups(spec.layout.v));
  spec.codes = code_tables(kv, spec.layout);
  return std::make_shared<const CacheSpec>(std::move(spec));
}

SequenceCache Model::Impl::new_cache(std::shared_ptr<const CacheSpec> spec, int64_t max_tokens) {
  std::shared_ptr<BlockPool> pages = pool(spec->layout.page_bytes);  // before spec moves
  return SequenceCache(*backend, std::move(pages), budget, std::move(spec), long_rope(max_tokens));
}

}  // namespace mustafar
