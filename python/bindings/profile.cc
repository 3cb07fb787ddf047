#include "mustafar/profile.h"

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <cstring>

#include "bindings.h"
#include "format/block_format.h"
#include "runtime/kv_statistics.h"

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
  std::memcpy(array.mutable_data(), values.data(), values.size() * 4);
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

std::shared_ptr<Profile> make(const py::object& k_forward, const py::object& k_backward,
                              const py::object& v_forward, const py::object& v_backward,
                              const py::object& k_weight, const py::object& v_weight,
                              const std::string& kind, const std::string& fingerprint,
                              const std::string& text_hash) {
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
  return p;
}

py::dict statistics_dict(const Model& model, const py::list& sequences,
                         const py::object& progress) {
  std::vector<std::vector<int32_t>> ids;
  for (const py::handle sequence : sequences) ids.push_back(token_ids_from(sequence));
  const auto check = interrupt_check();
  KVStatistics statistics;
  {
    py::gil_scoped_release release;
    statistics = gather_kv_statistics(model, ids, [&](int64_t done, int64_t total) {
      check();
      if (progress.is_none()) return;
      py::gil_scoped_acquire gil;
      progress(done, total);
    });
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

}  // namespace

void register_profile(py::module_& m) {
  m.def("default_group", &default_group, py::arg("head_dim"), py::arg("is_key"));
  m.def("kv_statistics", &statistics_dict, py::arg("model"), py::arg("sequences"),
        py::arg("progress"));
  py::class_<Profile, std::shared_ptr<Profile>>(m, "Profile")
      .def(py::init(&make), py::arg("k_forward"), py::arg("k_backward"), py::arg("v_forward"),
           py::arg("v_backward"), py::arg("k_weight"), py::arg("v_weight"), py::arg("kind"),
           py::arg("model_fingerprint"), py::arg("text_hash"),
           "A KV transform from float32 matrices [n_layers, n_kv_heads, D, D] and ranking weights "
           "[n_layers, n_kv_heads, D] or None.")
      .def_static(
          "load",
          [](const std::filesystem::path& file) {
            return std::const_pointer_cast<Profile>(Profile::load(file));
          },
          "Reads a profile; ModelError names file and tensor.")
      .def_static("hadamard",
                  [](const Model& model) {
                    return std::const_pointer_cast<Profile>(Profile::hadamard(model.config()));
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
                             [](const Profile& p) { return array_of(p, p.v_weight, false); });
}

}  // namespace mustafar
