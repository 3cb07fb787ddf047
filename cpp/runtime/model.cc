#include "mustafar/model.h"

#include <stdexcept>
#include <utility>

#include "core/hash.h"
#include "io/checkpoint.h"
#include "model/stored_weights.h"
#include "mustafar/error.h"
#include "mustafar/hub.h"
#include "runtime/model_impl.h"

namespace mustafar {
namespace {

class CheckpointTensors : public TensorSource {
 public:
  explicit CheckpointTensors(Checkpoint checkpoint) : checkpoint_(std::move(checkpoint)) {}

  bool has(const std::string& name) const override {
    return checkpoint_.find(name) != nullptr || quantised(name) != nullptr;
  }
  const StoredMatrix* quantised(const std::string& name) const override {
    return checkpoint_.find_quantised(name);
  }
  bool any_quantised(const std::function<bool(const StoredMatrix&)>& test) const override {
    bool any = false;
    checkpoint_.for_each_quantised(
        [&](const std::string&, const StoredMatrix& matrix) { any = any || test(matrix); });
    return any;
  }

  StoredTensor tensor(const std::string& name, const std::vector<int64_t>& shape) const override {
    const TensorView* view = checkpoint_.find(name);
    if (view == nullptr) throw ModelError("tensor " + name + " is missing");
    if (view->shape != shape) throw ModelError("tensor " + name + " has an unexpected shape");
    return {view->data, view->dtype};
  }

  void prepare(const void* data, int64_t bytes) const override {
    checkpoint_.prefault(data, bytes);
  }
  void check_read() const override { checkpoint_.check_read(); }
  void release(const void* data, int64_t bytes) const override { checkpoint_.release(data, bytes); }
  void read_all(const std::function<void(int64_t, int64_t)>& progress) const override {
    checkpoint_.load_all(progress);
  }

  const Checkpoint& checkpoint() const { return checkpoint_; }

 private:
  Checkpoint checkpoint_;
};

DType parse_dtype(const std::string& name, DType stored) {
  if (name == "auto") return stored;
  if (name == "f32") return DType::kF32;
  if (name == "f16") return DType::kF16;
  if (name == "bf16") return DType::kBF16;
  throw std::invalid_argument("dtype is \"" + name + "\", must be auto, f32, f16 or bf16");
}

// The type of the embedding as stored, or of the head where that is both.
DType stored_dtype(const ModelConfig& config, const TensorSource& source) {
  const char* first =
      source.has("model.embed_tokens.weight") ? "model.embed_tokens.weight" : "lm_head.weight";
  if (const StoredMatrix* matrix = source.quantised(first)) return matrix->expanded;
  return source.tensor(first, {config.vocab_size, config.hidden_size}).dtype;
}

// Rounding codes anew would lose quality for nothing; the rest of a quantised folder is values.
void check_format(const WeightFormat& format, const TensorSource& source) {
  if (format.as_stored) return;
  std::string found;
  source.any_quantised([&](const StoredMatrix& matrix) {
    if (keeps_codes(matrix)) found = matrix.description();
    return !found.empty();
  });
  if (found.empty()) return;
  throw std::invalid_argument("weights is \"" + format.name() +
                              "\", must be auto: the folder's weights are quantised already (" +
                              found + ")");
}

std::string fingerprint_of(const ModelConfig& c, const std::string& weights) {
  Hash64 hash;
  hash.add(c.model_type);
  for (int64_t value : {c.hidden_size, c.intermediate_size, c.n_layers, c.n_heads, c.n_kv_heads,
                        c.head_dim, c.vocab_size, c.max_position_embeddings}) {
    hash.add_int(value);
  }
  hash.add(&c.rms_norm_eps, sizeof(c.rms_norm_eps));
  for (float frequency : c.rope_inverse_frequencies()) hash.add(&frequency, sizeof(frequency));
  if (c.has_long_rope()) {
    for (float frequency : c.rope_inverse_frequencies(true))
      hash.add(&frequency, sizeof(frequency));
  }
  // Only where a family differs from Llama, whose fingerprints older files have.
  const FamilyTraits& t = c.traits;
  const double scalars[] = {t.embedding_multiplier, t.residual_multiplier, t.logits_scaling,
                            t.attention_multiplier + 1, c.rope_attention_factor};
  for (size_t i = 0; i < std::size(scalars); i++) {
    if (scalars[i] == 1) continue;
    hash.add_int(static_cast<int64_t>(i));
    hash.add(&scalars[i], sizeof(scalars[i]));
  }
  for (int32_t i = 0; i < c.n_layers; i++) {
    if (!t.rotates(i)) hash.add_int(i);
  }
  if (c.sliding_window > 0) {
    hash.add("sliding_window");
    for (int32_t i = 0; i < c.n_layers; i++) hash.add_int(c.window_of(i));
  }
  hash.add(weights);
  return hash.hex();
}

}  // namespace

Model make_model(const ModelConfig& config, std::shared_ptr<const TensorSource> source,
                 const ModelOptions& options, const std::filesystem::path& folder) {
  if (options.threads < 0) {
    throw std::invalid_argument("threads is " + std::to_string(options.threads) +
                                ", must be 0 (the default) or more");
  }
  if (options.kv_budget < 0) {
    throw std::invalid_argument("kv_budget is " + std::to_string(options.kv_budget) +
                                " bytes, must be 0 (no limit) or more");
  }
  const WeightFormat format = parse_weight_format(options.weights);
  auto impl = std::make_shared<Model::Impl>();
  impl->folder = folder;
  impl->config = config;
  impl->source = std::move(source);
  check_format(format, *impl->source);
  impl->dtype = parse_dtype(options.dtype, stored_dtype(config, *impl->source));
  impl->backend = make_backend(config, {options.device, impl->dtype, options.threads});
  impl->weight_format = format;
  // A device's copy is the reading, and so are quantising and unpacking; else the CPU's weights
  // stay where they are.
  const bool unpacks = impl->source->any_quantised([](const StoredMatrix&) { return true; });
  if (impl->backend->host_memory() && format.as_stored && !unpacks && options.progress) {
    impl->source->read_all(options.progress);
  }
  impl->weights = load_weights(config, *impl->source, *impl->backend, format, options.progress);
  impl->source->check_read();
  impl->budget = std::make_shared<KVBudget>(options.kv_budget);
  // What is copied or quantised is not read from its file again.
  const bool in_place = impl->backend->host_memory() && format.as_stored;
  impl->llama = std::make_unique<Llama>(impl->config, impl->weights.table, *impl->backend,
                                        in_place ? impl->source : nullptr);
  impl->fingerprint = fingerprint_of(config, impl->weights.fingerprint);
  return Model(std::move(impl));
}

Model Model::load(const std::filesystem::path& path, const ModelOptions& options) {
  const std::filesystem::path folder = find_model_folder(path);
  auto tensors = std::make_shared<CheckpointTensors>(Checkpoint::open(folder));
  Model model = make_model(tensors->checkpoint().config(), tensors, options, folder);
  Impl& impl = *model.impl_;
  const std::filesystem::path file = folder / "tokenizer.json";
  if (!std::filesystem::exists(file)) {
    impl.tokenizer_error = "the model folder " + folder.string() + " has no tokenizer.json";
    return model;
  }
  // A model whose tokenizer is of an unknown kind still runs on token ids.
  try {
    impl.tokenizer = Tokenizer::load(folder);
  } catch (const TokenizerError& error) {
    impl.tokenizer_error = error.what();
  }
  return model;
}

const std::shared_ptr<Model::Impl>& Model::impl() const {
  if (impl_ == nullptr) throw StateError("the model is closed");
  return impl_;
}

const ModelConfig& Model::config() const { return impl()->config; }
SamplingParams Model::default_sampling() const {
  return SamplingParams().with_defaults(impl()->config.sampling);
}
bool Model::has_tokenizer() const { return impl()->tokenizer.has_value(); }
const Tokenizer& Model::tokenizer() const {
  if (!impl()->tokenizer) throw TokenizerError(impl_->tokenizer_error);
  return *impl_->tokenizer;
}
const std::filesystem::path& Model::folder() const { return impl()->folder; }
std::string Model::device() const { return impl()->backend->device(); }
std::string Model::dtype() const { return dtype_name(impl()->dtype); }
std::string Model::weights() const { return impl()->weight_format.name(); }
std::string Model::device_description() const { return impl()->backend->description(); }
const std::string& Model::fingerprint() const { return impl()->fingerprint; }

ModelMemory Model::memory() const {
  const Impl& engine = *impl();
  ModelMemory memory;
  memory.weights_bytes = engine.weights.bytes;
  memory.workspace_bytes = engine.workspace_bytes;
  memory.kv_bytes = engine.budget->used();
  memory.kv_peak_bytes = engine.budget->peak();
  memory.kv_budget = engine.budget->limit();
  return memory;
}

void Model::close() { impl_.reset(); }

}  // namespace mustafar
