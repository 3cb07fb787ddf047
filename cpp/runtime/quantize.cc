#include "mustafar/quantize.h"

#include <algorithm>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/thread_pool.h"
#include "io/checkpoint.h"
#include "io/packed_folder.h"
#include "model/group_fit.h"
#include "mustafar/error.h"
#include "mustafar/hub.h"
#include "runtime/calibration_pieces.h"
#include "runtime/model_impl.h"
#include "runtime/weight_calibration.h"

namespace mustafar {
namespace {

// Tokens of a text that are calibrated on together, at most: what follows gains little from more.
constexpr size_t kPieceTokens = 2048;

void check(const QuantizeOptions& options) {
  const auto refuse = [](const std::string& name, int64_t value, const std::string& must) {
    throw std::invalid_argument(name + " is " + std::to_string(value) + ", must be " + must);
  };
  if (options.bits != 4 && options.bits != 8) refuse("bits", options.bits, "4 or 8");
  if (options.group != 32 && options.group != 64 && options.group != 128) {
    refuse("group", options.group, "32, 64 or 128");
  }
  if (options.threads < 0) refuse("threads", options.threads, "0 (the default) or more");
  if (options.max_tokens < -1) refuse("max_tokens", options.max_tokens, "-1 (all) or more");
  if (options.shard_bytes < 1) refuse("shard_bytes", options.shard_bytes, "1 or more");
}

bool is_layer_matrix(const TensorView& tensor) {
  return tensor.shape.size() == 2 && tensor.name.starts_with("model.layers.");
}

// What becomes of a tensor.
PlannedTensor plan_of(const TensorView& tensor, const QuantizeOptions& options) {
  PlannedTensor planned{std::string(tensor.name), tensor.dtype, tensor.shape, {}};
  if (!is_layer_matrix(tensor)) return planned;
  int32_t group = options.group;
  while (group >= 32 && tensor.shape[1] % group != 0) group /= 2;
  if (group < 32) return planned;
  const DType scales = tensor.dtype == DType::kF16 ? DType::kF16 : DType::kBF16;
  planned.format = GroupFormat{options.bits, group, options.symmetric, scales};
  return planned;
}

[[noreturn]] void throw_unfit(const std::string& name) {
  throw ModelError("tensor \"" + name + "\" has values that can't be quantised: expected finite " +
                   "ones, in groups whose scale its type can hold");
}

// Names in the order of the layers, whose numbers have no leading zeros.
bool comes_before(std::string_view a, std::string_view b) {
  constexpr std::string_view kLayers = "model.layers.";
  const auto layer_of = [&](std::string_view name) {
    return name.starts_with(kLayers) ? std::stoll(std::string(name.substr(kLayers.size()))) : -1;
  };
  const auto layer_a = layer_of(a), layer_b = layer_of(b);
  return layer_a != layer_b ? layer_a < layer_b : a < b;
}

// A model on its way to a folder.
class Quantizer {
 public:
  Quantizer(const std::filesystem::path& model, const std::filesystem::path& output,
            const QuantizeOptions& options)
      : options_(options), folder_(find_model_folder(model)), checkpoint_(open_stored(folder_)) {
    std::vector<const TensorView*> tensors;
    checkpoint_.for_each([&](const TensorView& tensor) { tensors.push_back(&tensor); });
    std::sort(tensors.begin(), tensors.end(),
              [](const auto* a, const auto* b) { return comes_before(a->name, b->name); });
    for (const TensorView* tensor : tensors) {
      plan_.push_back(plan_of(*tensor, options));
      result_.matrices += plan_.back().format.has_value();
      result_.stored_bytes += tensor->bytes;
    }
    if (result_.matrices == 0) {
      throw ModelError(folder_.string() + ": no matrix of a layer has inputs in groups of 32");
    }
    packed_.emplace(folder_, output, plan_, options.shard_bytes);
  }

  // Every weight to its nearest code.
  QuantizeResult round() {
    ThreadPool pool(options_.threads);
    int64_t done = 0;
    const auto report = [&](const PlannedTensor& planned) {
      done += checkpoint_.find(planned.name)->bytes;
      if (options_.progress) options_.progress(done, result_.stored_bytes);
    };
    for (const PlannedTensor& planned : plan_) {
      if (planned.format) {
        write_codes(planned, [&](const Matrix& stored, GroupCodes& codes) {
          return round_matrix(stored, pool, codes);
        });
      } else {
        write_as_stored(planned);
      }
      report(planned);
    }
    return finish();
  }

  QuantizeResult calibrate(std::span<const Prompt> texts) {
    ModelOptions on_cpu;
    on_cpu.device = "cpu";
    on_cpu.threads = options_.threads;
    const Model model = Model::load(folder_, on_cpu);
    std::vector<std::vector<int32_t>> pieces;
    for (const auto& ids : calibration_pieces(model, texts, options_.max_tokens)) {
      for (size_t at = 0; at < ids.size(); at += kPieceTokens) {
        pieces.emplace_back(ids.begin() + at,
                            ids.begin() + std::min(ids.size(), at + kPieceTokens));
        result_.tokens += static_cast<int64_t>(pieces.back().size());
      }
    }
    if (result_.tokens == 0) throw std::invalid_argument("calibration needs text: it has no token");
    std::map<std::string_view, const PlannedTensor*> matrices;
    for (const PlannedTensor& planned : plan_) {
      if (planned.format) {
        matrices[planned.name] = &planned;
      } else {
        write_as_stored(planned);
      }
    }
    ThreadPool& pool = *model.impl()->backend->host_pool();
    calibrate_layers(
        model, pieces,
        [&](const std::string& name, const InputMoments& moments) -> std::optional<GroupCodes> {
          const auto found = matrices.find(name);
          if (found == matrices.end()) return std::nullopt;
          return write_codes(*found->second, [&](const Matrix& stored, GroupCodes& codes) {
            return round_with_feedback(stored, moments, pool, codes);
          });
        },
        options_.progress);
    return finish();
  }

 private:
  static Checkpoint open_stored(const std::filesystem::path& folder) {
    refuse_quantised(folder);
    return Checkpoint::open(folder);
  }

  void write_as_stored(const PlannedTensor& planned) {
    const TensorView& tensor = *checkpoint_.find(planned.name);
    checkpoint_.prefault(tensor.data, tensor.bytes);
    packed_->write(planned.name, tensor.data);
    checkpoint_.release(tensor.data, tensor.bytes);
  }

  template <typename Round>
  GroupCodes write_codes(const PlannedTensor& planned, const Round& round) {
    const TensorView& tensor = *checkpoint_.find(planned.name);
    checkpoint_.prefault(tensor.data, tensor.bytes);
    const Matrix stored{tensor.data, tensor.dtype, tensor.shape[0], tensor.shape[1]};
    GroupCodes codes(*planned.format, stored.rows, stored.cols);
    if (!round(stored, codes)) throw_unfit(planned.name);
    packed_->write(planned.name, codes);
    checkpoint_.release(tensor.data, tensor.bytes);
    return codes;
  }

  QuantizeResult finish() {
    checkpoint_.check_read();
    packed_->finish();
    result_.bytes = packed_->total_bytes();
    return result_;
  }

  const QuantizeOptions& options_;
  const std::filesystem::path folder_;
  const Checkpoint checkpoint_;
  std::vector<PlannedTensor> plan_;
  std::optional<PackedFolder> packed_;
  QuantizeResult result_;
};

}  // namespace

QuantizeResult quantize(const std::filesystem::path& model, const std::filesystem::path& output,
                        std::span<const Prompt> texts, const QuantizeOptions& options) {
  check(options);
  Quantizer quantizer(model, output, options);
  return texts.empty() ? quantizer.round() : quantizer.calibrate(texts);
}

}  // namespace mustafar
