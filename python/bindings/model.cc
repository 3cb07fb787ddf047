#include "mustafar/model.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include "bindings.h"
#include "gil.h"
#include "mustafar/profile.h"

namespace py = pybind11;

namespace mustafar {
namespace {

py::dict config_dict(const ModelConfig& c) {
  py::dict d;
  d["model_type"] = c.model_type;
  d["hidden_size"] = c.hidden_size;
  d["intermediate_size"] = c.intermediate_size;
  d["n_layers"] = c.n_layers;
  d["n_heads"] = c.n_heads;
  d["n_kv_heads"] = c.n_kv_heads;
  d["head_dim"] = c.head_dim;
  d["vocab_size"] = c.vocab_size;
  d["max_position_embeddings"] = c.max_position_embeddings;
  d["sliding_window"] = c.sliding_window > 0 ? py::object(py::int_(c.sliding_window)) : py::none();
  d["sliding_window_layers"] = c.layers_with_windows();
  d["rms_norm_eps"] = c.rms_norm_eps;
  d["rope_theta"] = c.rope_theta;
  d["tie_word_embeddings"] = c.tie_word_embeddings;
  d["bos_token_id"] = c.bos_token_id < 0 ? py::object(py::none()) : py::int_(c.bos_token_id);
  d["eos_token_ids"] = c.eos_token_ids;
  return d;
}

Model load(const std::filesystem::path& path, const std::string& device, const std::string& dtype,
           const std::string& weights, int32_t threads, int64_t kv_budget,
           const py::object& progress) {
  ModelOptions options;
  options.device = device;
  options.dtype = dtype;
  options.weights = weights;
  options.threads = threads;
  options.kv_budget = kv_budget;
  if (!progress.is_none()) {
    options.progress = [&progress](int64_t done, int64_t total) {
      AcquireGil gil;
      progress(done, total);
    };
  }
  ReleaseGil release;
  return Model::load(path, options);
}

// params: one for each prompt.
py::list generate(const Model& model, const py::list& prompts, const py::list& params,
                  const py::dict& kv, int32_t max_batch, bool parse_special) {
  const std::vector<Prompt> native = prompts_from(prompts);
  std::vector<SamplingParams> sampling;
  for (const py::handle each : params) {
    sampling.push_back(sampling_params_from(py::reinterpret_borrow<py::dict>(each)));
  }
  const KVConfig config = kv_config_from(kv, model);
  BatchOptions options;
  options.max_batch = max_batch;
  options.parse_special = parse_special;
  options.interrupt_check = interrupt_check();
  std::vector<GenerateResult> results;
  {
    ReleaseGil release;
    results = model.generate(native, sampling, config, options);
  }
  py::list out;
  for (const GenerateResult& result : results) out.append(to_dict(result));
  return out;
}

// The fields of SamplingParams that a folder may decide, decided.
py::dict sampling_dict(const Model& model) {
  const SamplingParams p = model.default_sampling();
  py::dict d;
  d["temperature"] = p.temperature;
  d["top_k"] = p.top_k;
  d["top_p"] = p.top_p;
  d["min_p"] = p.min_p;
  d["repetition_penalty"] = p.repetition_penalty;
  d["presence_penalty"] = p.presence_penalty;
  d["frequency_penalty"] = p.frequency_penalty;
  d["penalty_window"] = p.penalty_window;
  return d;
}

py::dict weights_memory(const Model& model) {
  const ModelMemory memory = model.memory();
  py::dict d;
  d["weights_bytes"] = memory.weights_bytes;
  d["workspace_bytes"] = memory.workspace_bytes;
  d["kv_bytes"] = memory.kv_bytes;
  d["kv_peak_bytes"] = memory.kv_peak_bytes;
  d["kv_budget"] = memory.kv_budget;
  return d;
}

}  // namespace

void register_model(py::module_& m) {
  py::class_<Model>(m, "Model")
      .def(py::init(&load), py::arg("path"), py::arg("device"), py::arg("dtype"),
           py::arg("weights"), py::arg("threads"), py::arg("kv_budget"), py::arg("progress"))
      .def("config", [](const Model& model) { return config_dict(model.config()); })
      .def("default_sampling", &sampling_dict)
      .def("has_tokenizer", &Model::has_tokenizer)
      .def("tokenizer", [](const Model& model) { return model.tokenizer(); })
      .def("folder", &Model::folder)
      .def("device", &Model::device)
      .def("dtype", &Model::dtype)
      .def("weights", &Model::weights)
      .def("device_description", &Model::device_description)
      .def("fingerprint", &Model::fingerprint)
      .def("memory", &weights_memory)
      .def("generate", &generate)
      .def("close", &Model::close, py::call_guard<ReleaseGil>());
}

}  // namespace mustafar
