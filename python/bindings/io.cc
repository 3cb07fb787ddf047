// Finding model folders; and readers of them, for the tests that compare them with other
// implementations.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>

#include "bindings.h"
#include "io/model_config.h"
#include "io/safetensors.h"
#include "mustafar/hub.h"

namespace mustafar {
namespace {

namespace py = pybind11;

py::dict safetensors_header(const std::filesystem::path& path) {
  const SafetensorsFile file = SafetensorsFile::open(path);
  py::dict result;
  for (const SafetensorsEntry& entry : file.entries) {
    result[py::str(entry.name)] = py::make_tuple(entry.dtype, entry.shape, entry.begin, entry.end);
  }
  return result;
}

py::tuple rope_frequencies(const std::filesystem::path& folder, bool long_context) {
  const ModelConfig config = read_model_config(folder);
  const bool scales = config.rope_scaling != RopeScaling::kNone;
  return py::make_tuple(scales ? rope_scaling_name(config.rope_scaling) : "default",
                        config.rope_inverse_frequencies(long_context),
                        config.rope_attention_factor);
}

}  // namespace

void register_io(py::module_& m) {
  m.def("find_model_folder", &find_model_folder, py::arg("name"),
        "The folder itself, or the newest snapshot of a repository id in the local Hugging Face\n"
        "cache. Raises ModelError naming the place where nothing was found.");
  m.def(
      "_safetensors_header", &safetensors_header, py::arg("path"),
      "Tensors of a safetensors file: name -> (dtype, shape, begin, end), begin and end in bytes\n"
      "from the start of the file. Raises ModelError for a file that is not valid.");
  m.def("_rope_frequencies", &rope_frequencies, py::arg("folder"), py::arg("long_context") = false,
        "(scaling, inverse frequencies [rotated dims / 2], attention factor) of a model folder's\n"
        "config.json; long_context: of sequences beyond longrope's original context.");
}

}  // namespace mustafar
