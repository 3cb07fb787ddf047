// Pruning by magnitude is a dead-zone quantiser with a significance map, so, like every transform
// coder, it wants a basis that concentrates energy. With row vectors and F B = I:
//
//   klt        F = eigenvectors of S = E[k^T k], B = F^T.
//   balanced   errors count in the metric M of what the vectors meet: for keys M = E[q^T q] over
//   the
//              group's queries, for values M = sum of W_o,h^T W_o,h over its heads. With a the
//              balance, F = M^(a/2) U with U the eigenvectors of M^(a/2) S M^(a/2), and
//              B = U^T M^(-a/2).
//
// Columns of F stand by falling eigenvalue, which is the dim's energy: F^T S F is diagonal. RoPE
// moves the energy of keys between dims with position, so where contexts are longer than the texts
// a dim's energy is the most that it has anywhere, and columns stand by that.
#include "mustafar/calibration.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <utility>
#include <variant>
#include <vector>

#include "core/hash.h"
#include "core/symmetric_eigen.h"
#include "core/thread_pool.h"
#include "mustafar/error.h"
#include "runtime/calibration_pieces.h"
#include "runtime/kv_statistics.h"
#include "runtime/layer_costs.h"
#include "runtime/model_impl.h"
#include "runtime/position_energies.h"

namespace mustafar {
namespace {

// Directions of the metric weaker than this fraction of the strongest count as that strong.
constexpr double kMetricFloor = 1e-4;
// Dims weaker than this fraction of the strongest are scaled as if they were that strong.
constexpr double kScaleFloor = 1e-3;

using Square = std::vector<double>;  // [d][d]

// a b
Square product(int32_t d, const Square& a, const Square& b) {
  Square out(a.size(), 0.0);
  for (int32_t i = 0; i < d; i++) {
    double* to = out.data() + int64_t{i} * d;
    for (int32_t k = 0; k < d; k++) {
      const double x = a[int64_t{i} * d + k];
      const double* from = b.data() + int64_t{k} * d;
      for (int32_t j = 0; j < d; j++) to[j] += x * from[j];
    }
  }
  return out;
}

Square transposed(int32_t d, const Square& a) {
  Square out(a.size());
  for (int32_t i = 0; i < d; i++) {
    for (int32_t j = 0; j < d; j++) out[int64_t{j} * d + i] = a[int64_t{i} * d + j];
  }
  return out;
}

// The symmetric matrix with the eigenvectors of `eigen` and these eigenvalues [d].
Square with_eigenvalues(int32_t d, const SymmetricEigen& eigen, const std::vector<double>& values) {
  Square scaled = eigen.vectors;
  for (int32_t i = 0; i < d; i++) {
    for (int32_t j = 0; j < d; j++) scaled[int64_t{i} * d + j] *= values[i];
  }
  return product(d, transposed(d, eigen.vectors), scaled);
}

struct Basis {
  Square forward, backward;    // F, B
  std::vector<double> energy;  // [d] mean squares of x F, falling
};

// moment, metric: [d][d].
Basis basis_of(int32_t d, const Square& moment, Square metric, double balance) {
  double trace = 0;
  for (int32_t i = 0; i < d; i++) trace += metric[int64_t{i} * d + i];
  Basis basis;
  if (balance == 0 || trace <= 0) {
    SymmetricEigen eigen = symmetric_eigen(d, moment.data());
    basis.forward = transposed(d, eigen.vectors);
    basis.backward = std::move(eigen.vectors);
    basis.energy = std::move(eigen.values);
  } else {
    for (double& x : metric) x *= d / trace;
    const SymmetricEigen strength = symmetric_eigen(d, metric.data());
    std::vector<double> up(d), down(d);
    for (int32_t i = 0; i < d; i++) {
      const double value = std::max(strength.values[i], kMetricFloor * strength.values[0]);
      up[i] = std::pow(value, balance / 2);
      down[i] = 1 / up[i];
    }
    const Square root = with_eigenvalues(d, strength, up);
    Square weighted = product(d, product(d, root, moment), root);
    for (int32_t i = 0; i < d; i++) {  // symmetric but for rounding
      for (int32_t j = 0; j < i; j++) {
        double &lower = weighted[int64_t{i} * d + j], &upper = weighted[int64_t{j} * d + i];
        lower = upper = (lower + upper) / 2;
      }
    }
    SymmetricEigen eigen = symmetric_eigen(d, weighted.data());
    basis.forward = product(d, root, transposed(d, eigen.vectors));
    basis.backward = product(d, eigen.vectors, with_eigenvalues(d, strength, down));
    basis.energy = std::move(eigen.values);
  }
  for (double& x : basis.energy) x = std::max(x, 0.0);
  return basis;
}

// Gives dims other energies [d], and sorts them by these.
void set_energies(int32_t d, const std::vector<double>& energy, Basis& basis) {
  std::vector<int32_t> order(d);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return energy[a] > energy[b]; });
  const Basis old = basis;
  for (int32_t i = 0; i < d; i++) {
    basis.energy[i] = energy[order[i]];
    for (int32_t j = 0; j < d; j++) {
      basis.forward[int64_t{j} * d + i] = old.forward[int64_t{j} * d + order[i]];
      basis.backward[int64_t{i} * d + j] = old.backward[int64_t{order[i]} * d + j];
    }
  }
}

// Where one head's part of a profile goes.
struct HeadOut {
  float *forward, *backward;  // [d][d]
  float* weight;              // [d] or null
  float* sigma;               // [d]
};

void write_head(int32_t d, const Basis& basis, double scale_power, const HeadOut& out) {
  std::vector<double> sigma(d), scale(d, 1.0);
  for (int32_t i = 0; i < d; i++) sigma[i] = std::sqrt(basis.energy[i]);
  constexpr double kTiny = 1e-30;  // for a head that carries nothing at all
  if (out.weight != nullptr) {
    for (int32_t i = 0; i < d; i++) {
      scale[i] = std::pow(std::max(sigma[i], kScaleFloor * sigma[0] + kTiny), scale_power);
      out.weight[i] = static_cast<float>(scale[i]);
    }
  }
  for (int32_t i = 0; i < d; i++) {
    for (int32_t j = 0; j < d; j++) {
      const int64_t at = int64_t{i} * d + j;
      out.forward[at] = static_cast<float>(basis.forward[at] / scale[j]);
      out.backward[at] = static_cast<float>(basis.backward[at] * scale[i]);
    }
    sigma[i] /= scale[i];
  }
  for (int32_t i = 0; i < d; i++) {
    out.sigma[i] = static_cast<float>(std::max(sigma[i], Profile::kLeastSigma * sigma[0] + kTiny));
  }
}

// Of CalibrationOptions::context. longrope has other frequencies beyond its original context, which
// texts that end before it don't show.
int64_t longest_context(const ModelConfig& c, int64_t context) {
  if (context == 0) context = c.max_position_embeddings;
  return c.has_long_rope() ? std::min<int64_t>(context, c.rope_original_context) : context;
}

void check(const CalibrationOptions& options) {
  const auto refuse = [](const std::string& what, const std::string& must) {
    throw std::invalid_argument(what + ", must be " + must);
  };
  if (options.kind != "hadamard" && options.kind != "klt" && options.kind != "balanced") {
    refuse("kind is '" + options.kind + "'", "hadamard, klt or balanced");
  }
  if (!(options.balance >= 0 && options.balance <= 1)) {
    refuse("balance is " + std::to_string(options.balance), "in [0, 1]");
  }
  if (!(options.scale_power >= 0 && options.scale_power <= 1)) {
    refuse("scale_power is " + std::to_string(options.scale_power), "in [0, 1]");
  }
  if (options.max_tokens < -1) {
    refuse("max_tokens is " + std::to_string(options.max_tokens), "-1 (all) or more");
  }
  if (options.skip_tokens < 0) {
    refuse("skip_tokens is " + std::to_string(options.skip_tokens), "0 or more");
  }
  if (options.context < 0) {
    refuse("context is " + std::to_string(options.context), "0 (the model's) or more");
  }
}

}  // namespace

std::vector<std::vector<int32_t>> calibration_pieces(const Model& model,
                                                     std::span<const Prompt> texts,
                                                     int64_t max_tokens) {
  const int64_t context = model.config().max_position_embeddings;
  int64_t left = max_tokens < 0 ? std::numeric_limits<int64_t>::max() : max_tokens;
  std::vector<std::vector<int32_t>> pieces;
  for (const Prompt& text : texts) {
    const auto* given = std::get_if<std::vector<int32_t>>(&text);
    const std::vector<int32_t> ids =
        given != nullptr ? *given : model.tokenizer().encode(std::get<std::string>(text));
    const int64_t n = std::min(left, static_cast<int64_t>(ids.size()));
    left -= n;
    for (int64_t at = 0; at < n; at += context) {
      pieces.emplace_back(ids.begin() + at, ids.begin() + std::min(at + context, n));
    }
  }
  return pieces;
}

std::string calibration_text_hash(std::span<const std::vector<int32_t>> pieces) {
  Hash64 hash;
  for (const std::vector<int32_t>& piece : pieces) {
    hash.add_int(static_cast<int64_t>(piece.size()));
    for (int32_t id : piece) hash.add_int(id);
  }
  return hash.hex();
}

Profile calibrate(const Model& model, std::span<const Prompt> texts,
                  const CalibrationOptions& options) {
  check(options);
  const ModelConfig& c = model.config();
  if (options.kind == "hadamard" && options.budget) {
    throw std::invalid_argument("budget needs kind klt or balanced: hadamard has no sigmas");
  }
  if (options.kind == "hadamard") return *Profile::hadamard(c);
  const auto pieces = calibration_pieces(model, texts, options.max_tokens);

  std::optional<ThreadPool> own;  // where the model's device has no threads of the host's
  ThreadPool* pool = model.impl()->backend->host_pool();
  if (pool == nullptr) pool = &own.emplace(0);
  int64_t text_tokens = 0;
  for (const auto& piece : pieces) text_tokens += static_cast<int64_t>(piece.size());
  const int64_t total = text_tokens + (options.budget ? cost_measure_tokens(model, pieces) : 0);
  const auto between = [&options, total](int64_t done, int64_t) {
    if (options.progress) options.progress(done, total);
  };
  const KVStatistics sums =
      gather_kv_statistics(model, pieces, options.skip_tokens, *pool, between);
  if (sums.tokens < 2) {
    throw std::invalid_argument("calibration needs text: pieces of more than " +
                                std::to_string(options.skip_tokens + 1) + " tokens");
  }

  Profile profile;
  profile.n_layers = c.n_layers;
  profile.n_kv_heads = c.n_kv_heads;
  profile.head_dim = c.head_dim;
  profile.kind = options.kind;
  profile.model_fingerprint = model.impl()->fingerprint;
  profile.text_hash = calibration_text_hash(pieces);
  const int64_t heads = int64_t{c.n_layers} * c.n_kv_heads, d = c.head_dim, square = d * d;
  for (auto* matrices :
       {&profile.k_forward, &profile.k_backward, &profile.v_forward, &profile.v_backward}) {
    matrices->resize(heads * square);
  }
  for (auto* sigma : {&profile.k_sigma, &profile.v_sigma}) sigma->resize(heads * d);
  if (options.scale_power > 0) {
    for (auto* weight : {&profile.k_weight, &profile.v_weight}) weight->resize(heads * d);
  }

  const double balance = options.kind == "balanced" ? options.balance : 0.0;
  const std::vector<int64_t> offsets = text_offsets(longest_context(c, options.context));
  const auto head_task = [&](int64_t head, bool is_key) {
    const auto part = [&](const std::vector<double>& all) {
      return Square(all.begin() + head * square, all.begin() + (head + 1) * square);
    };
    Square moment = part(is_key ? sums.keys : sums.values);
    Square metric = part(is_key ? sums.queries : sums.outputs);
    for (int64_t i = 0; i < square; i++) {
      moment[i] /= static_cast<double>(sums.tokens);
      if (!std::isfinite(moment[i]) || !std::isfinite(metric[i])) {
        throw Error(std::string(is_key ? "keys" : "values") + " of layer " +
                    std::to_string(head / c.n_kv_heads) + ", KV head " +
                    std::to_string(head % c.n_kv_heads) + " are not finite on this text");
      }
    }
    Basis basis = basis_of(c.head_dim, moment, std::move(metric), balance);
    if (is_key && offsets.size() > 1 &&
        c.traits.rotates(static_cast<int32_t>(head / c.n_kv_heads))) {
      set_energies(c.head_dim, most_energies(c, offsets, moment, basis.forward), basis);
    }
    std::vector<float>& weight = is_key ? profile.k_weight : profile.v_weight;
    write_head(c.head_dim, basis, options.scale_power,
               {(is_key ? profile.k_forward : profile.v_forward).data() + head * square,
                (is_key ? profile.k_backward : profile.v_backward).data() + head * square,
                weight.empty() ? nullptr : weight.data() + head * d,
                (is_key ? profile.k_sigma : profile.v_sigma).data() + head * d});
  };
  for (int64_t layer = 0; layer < c.n_layers; layer++) {
    pool->parallel_for(2 * c.n_kv_heads, [&](int64_t i, int) {
      head_task(layer * c.n_kv_heads + i / 2, i % 2 == 0);
    });
    between(text_tokens, total);  // may throw to stop
  }
  if (options.budget) {
    measure_costs(model, pieces, profile,
                  [&](int64_t done, int64_t) { between(text_tokens + done, total); });
  }
  return profile;
}

}  // namespace mustafar
