#include "mustafar/profile.h"

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <cstring>
#include <optional>

#include "bindings.h"
#include "core/symmetric_eigen.h"
#include "core/thread_pool.h"
#include "gil.h"
#include "mustafar/calibration.h"
#include "runtime/kv_statistics.h"
#include "runtime/row_budget.h"

namespace py = pybind11;

namespace mustafar {
namespace {

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;

// [n_layers][n_kv_heads][D]([D]); none: empty.
py::object array_of(const Profile& p, const std::vector<float>& values, bool matrix) {
  if (values.empty()) return py::none();
  std::vector<py::ssize_t> shape = {p.n_layers, p.n_kv_heads, p.head_dim};
  if (matrix) shape.push_back(p.head_dim);
  py::array_t<float> array(shape);
  std::memcpy(array.mutable_data(), values.data(), values.size() * sizeof(float));
  return array;
}

std::vector<float> values_of(const Profile& p, const py::object& array, bool matrix,
                             const char* name) {
  if (array.is_none()) return {};
  const FloatArray values = FloatArray::ensure(array);
  std::vector<py::ssize_t> shape = {p.n_layers, p.n_kv_heads, p.head_dim};
  if (matrix) shape.push_back(p.head_dim);
  bool fits = values && values.ndim() == static_cast<py::ssize_t>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); i++) {
    fits = values.shape(static_cast<py::ssize_t>(i)) == shape[i];
  }
  if (!fits) {
    PyErr_Clear();
    throw py::value_error(std::string(name) + " must be float32 [n_layers, n_kv_heads, D" +
                          (matrix ? ", D]" : "]") + " like k_forward");
  }
  return {values.data(), values.data() + values.size()};
}

// [n_layers]; none: empty.
std::vector<float> costs_of(const Profile& p, const py::object& array, const char* name) {
  if (array.is_none()) return {};
  const FloatArray values = FloatArray::ensure(array);
  if (!values || values.ndim() != 1 || values.shape(0) != p.n_layers) {
    PyErr_Clear();
    throw py::value_error(std::string(name) + " must be float32 [n_layers]");
  }
  return {values.data(), values.data() + values.size()};
}

py::object cost_array(const std::vector<float>& values) {
  if (values.empty()) return py::none();
  return py::array_t<float>(static_cast<py::ssize_t>(values.size()), values.data());
}

std::shared_ptr<Profile> make_profile(const py::object& k_forward, const py::object& k_backward,
                                      const py::object& v_forward, const py::object& v_backward,
                                      const py::object& k_weight, const py::object& v_weight,
                                      const std::string& kind, const std::string& fingerprint,
                                      const std::string& text_hash, const py::object& k_sigma,
                                      const py::object& v_sigma, const py::object& k_cost,
                                      const py::object& v_cost) {
  const FloatArray first = FloatArray::ensure(k_forward);
  if (!first || first.ndim() != 4) {
    PyErr_Clear();
    throw py::value_error("k_forward must be float32 [n_layers, n_kv_heads, D, D]");
  }
  auto p = std::make_shared<Profile>();
  p->n_layers = static_cast<int32_t>(first.shape(0));
  p->n_kv_heads = static_cast<int32_t>(first.shape(1));
  p->head_dim = static_cast<int32_t>(first.shape(2));
  p->kind = kind;
  p->model_fingerprint = fingerprint;
  p->text_hash = text_hash;
  p->k_forward = values_of(*p, k_forward, true, "k_forward");
  p->k_backward = values_of(*p, k_backward, true, "k_backward");
  p->v_forward = values_of(*p, v_forward, true, "v_forward");
  p->v_backward = values_of(*p, v_backward, true, "v_backward");
  p->k_weight = values_of(*p, k_weight, false, "k_weight");
  p->v_weight = values_of(*p, v_weight, false, "v_weight");
  p->k_sigma = values_of(*p, k_sigma, false, "k_sigma");
  p->v_sigma = values_of(*p, v_sigma, false, "v_sigma");
  p->k_cost = costs_of(*p, k_cost, "k_cost");
  p->v_cost = costs_of(*p, v_cost, "v_cost");
  return p;
}

std::shared_ptr<Profile> calibrate_profile(const Model& model, const py::list& texts,
                                           const std::string& kind, double balance,
                                           double scale_power, int64_t max_tokens,
                                           int32_t skip_tokens, const py::object& progress,
                                           bool budget, int64_t context) {
  const std::vector<Prompt> native = prompts_from(texts);
  CalibrationOptions options;
  options.kind = kind;
  options.balance = balance;
  options.scale_power = scale_power;
  options.max_tokens = max_tokens;
  options.skip_tokens = skip_tokens;
  options.progress = progress_reporter(progress);
  options.budget = budget;
  options.context = context;
  ReleaseGil release;
  return std::make_shared<Profile>(calibrate(model, native, options));
}

// Writes to the package's logger, from native threads without the GIL.
std::function<void(const std::string&)> logger(const char* level) {
  return [level](const std::string& line) {
    AcquireGil gil;
    py::module_::import("logging").attr("getLogger")("mustafar").attr(level)("%s", line);
  };
}

// For tests: bytes of rows in every layer, and the divergence that they predict.
py::tuple dealt_rows(const std::shared_ptr<Profile>& profile, std::optional<double> bytes_per_token,
                     std::optional<double> max_kld) {
  KVConfig config;
  config.value_dtype = ValueType::kCoded;
  config.profile = profile;
  config.budget_bytes_per_token = bytes_per_token;
  config.max_kld = max_kld;
  config.validate();
  const RowSizes rows = deal_rows(config);
  return py::make_tuple(rows.k_row_bytes, rows.v_row_bytes, rows.predicted_kld);
}

// For tests: the sums that calibration starts from.
py::dict statistics_dict(const Model& model, const py::list& sequences, int32_t skip) {
  std::vector<std::vector<int32_t>> ids;
  for (const py::handle sequence : sequences) ids.push_back(token_ids_from(sequence));
  KVStatistics statistics;
  {
    ReleaseGil release;
    ThreadPool pool(1);
    statistics = gather_kv_statistics(model, ids, skip, pool);
  }
  const ModelConfig& c = model.config();
  const auto array = [&](const std::vector<double>& values) {
    py::array_t<double> out({c.n_layers, c.n_kv_heads, c.head_dim, c.head_dim});
    std::memcpy(out.mutable_data(), values.data(), values.size() * sizeof(double));
    return out;
  };
  py::dict d;
  d["tokens"] = statistics.tokens;
  d["keys"] = array(statistics.keys);
  d["values"] = array(statistics.values);
  d["queries"] = array(statistics.queries);
  d["outputs"] = array(statistics.outputs);
  return d;
}

// For tests: eigenvalues [n], falling, and eigenvectors [n, n], one a row.
py::tuple eigen_of(const py::array_t<double, py::array::c_style | py::array::forcecast>& matrix) {
  if (matrix.ndim() != 2 || matrix.shape(0) != matrix.shape(1) || matrix.size() == 0) {
    throw py::value_error("matrix must be [n, n]");
  }
  const py::ssize_t n = matrix.shape(0);
  const SymmetricEigen eigen = symmetric_eigen(static_cast<int32_t>(n), matrix.data());
  py::array_t<double> values(n), vectors({n, n});
  std::memcpy(values.mutable_data(), eigen.values.data(), eigen.values.size() * sizeof(double));
  std::memcpy(vectors.mutable_data(), eigen.vectors.data(), eigen.vectors.size() * sizeof(double));
  return py::make_tuple(values, vectors);
}

}  // namespace

std::shared_ptr<Profile> resolve_profile(const std::string& name, const Model& model,
                                         const py::object& progress, bool costs) {
  ProfileHooks hooks;
  hooks.progress = progress_reporter(progress);
  hooks.note = logger("info");
  hooks.warning = logger("warning");
  ReleaseGil release;
  return std::const_pointer_cast<Profile>(Profile::resolve(name, model, hooks, costs));
}

void register_profile(py::module_& m) {
  m.def("kv_statistics", &statistics_dict, py::arg("model"), py::arg("sequences"), py::arg("skip"));
  m.def("resolve_profile", &resolve_profile, py::arg("name"), py::arg("model"), py::arg("progress"),
        py::arg("costs") = false);
  m.def("deal_rows", &dealt_rows, py::arg("profile"), py::arg("budget_bytes_per_token"),
        py::arg("max_kld"));
  m.def("symmetric_eigen", &eigen_of, py::arg("matrix"));
  m.def("calibrate", &calibrate_profile, py::arg("model"), py::arg("texts"), py::arg("kind"),
        py::arg("balance"), py::arg("scale_power"), py::arg("max_tokens"), py::arg("skip_tokens"),
        py::arg("progress"), py::arg("budget") = false, py::arg("context") = 0);
  py::class_<Profile, std::shared_ptr<Profile>>(m, "Profile")
      .def(py::init(&make_profile), py::arg("k_forward"), py::arg("k_backward"),
           py::arg("v_forward"), py::arg("v_backward"), py::arg("k_weight"), py::arg("v_weight"),
           py::arg("kind"), py::arg("model_fingerprint"), py::arg("text_hash"),
           py::arg("k_sigma") = py::none(), py::arg("v_sigma") = py::none(),
           py::arg("k_cost") = py::none(), py::arg("v_cost") = py::none(),
           "A KV transform from float32 matrices [n_layers, n_kv_heads, D, D]; ranking weights and "
           "root mean squares of transformed dims, [n_layers, n_kv_heads, D] or None; and what "
           "errors cost, [n_layers] or None.")
      .def_static(
          "load",
          [](const std::filesystem::path& file) {
            return std::const_pointer_cast<Profile>(Profile::load(file));
          },
          "Reads a profile; ModelError names file and tensor.")
      .def_static("hadamard",
                  [](const Model& model) {
                    return std::const_pointer_cast<Profile>(Profile::resolve("hadamard", model));
                  })
      .def("save", &Profile::save, "Writes a safetensors file, whole or not at all.")
      .def("hash", &Profile::hash, "16 hex digits of everything that changes results.")
      .def_readonly("kind", &Profile::kind)
      .def_readonly("model_fingerprint", &Profile::model_fingerprint)
      .def_readonly("text_hash", &Profile::text_hash)
      .def_readonly("n_layers", &Profile::n_layers)
      .def_readonly("n_kv_heads", &Profile::n_kv_heads)
      .def_readonly("head_dim", &Profile::head_dim)
      .def_property_readonly("k_forward",
                             [](const Profile& p) { return array_of(p, p.k_forward, true); })
      .def_property_readonly("k_backward",
                             [](const Profile& p) { return array_of(p, p.k_backward, true); })
      .def_property_readonly("v_forward",
                             [](const Profile& p) { return array_of(p, p.v_forward, true); })
      .def_property_readonly("v_backward",
                             [](const Profile& p) { return array_of(p, p.v_backward, true); })
      .def_property_readonly("k_weight",
                             [](const Profile& p) { return array_of(p, p.k_weight, false); })
      .def_property_readonly("v_weight",
                             [](const Profile& p) { return array_of(p, p.v_weight, false); })
      .def_property_readonly("k_sigma",
                             [](const Profile& p) { return array_of(p, p.k_sigma, false); })
      .def_property_readonly("v_sigma",
                             [](const Profile& p) { return array_of(p, p.v_sigma, false); })
      .def_property_readonly("k_cost", [](const Profile& p) { return cost_array(p.k_cost); })
      .def_property_readonly("v_cost", [](const Profile& p) { return cost_array(p.v_cost); });
}

}  // namespace mustafar
