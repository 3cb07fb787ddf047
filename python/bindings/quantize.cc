// Writing folders of quantised weights.
#include "mustafar/quantize.h"

#include <pybind11/stl/filesystem.h>

#include "bindings.h"
#include "gil.h"

namespace py = pybind11;

namespace mustafar {
namespace {

// Matrices that became codes, bytes as stored and as written, tokens.
py::tuple quantize_folder(const std::filesystem::path& model, const std::filesystem::path& output,
                          const py::list& texts, int64_t max_tokens, int32_t bits, int32_t group,
                          bool symmetric, int32_t threads, int64_t shard_bytes,
                          const py::object& progress) {
  const std::vector<Prompt> native = prompts_from(texts);
  QuantizeOptions options;
  options.max_tokens = max_tokens;
  options.bits = bits;
  options.group = group;
  options.symmetric = symmetric;
  options.threads = threads;
  options.shard_bytes = shard_bytes;
  options.progress = progress_reporter(progress);
  QuantizeResult result;
  {
    ReleaseGil release;
    result = quantize(model, output, native, options);
  }
  return py::make_tuple(result.matrices, result.stored_bytes, result.bytes, result.tokens);
}

}  // namespace

void register_quantize(py::module_& m) {
  m.def("quantize", &quantize_folder, py::arg("model"), py::arg("output"), py::arg("texts"),
        py::arg("max_tokens"), py::arg("bits"), py::arg("group"), py::arg("symmetric"),
        py::arg("threads"), py::arg("shard_bytes"), py::arg("progress"));
}

}  // namespace mustafar
