#include "mustafar/tool_calls.h"

#include <pybind11/stl.h>

#include "bindings.h"

namespace py = pybind11;

namespace mustafar {

void register_tool_calls(py::module_& m) {
  py::class_<ToolCallReader>(m, "ToolCallReader")
      .def(py::init([](const std::string& tools, const Tokenizer* tokenizer) {
             return tokenizer != nullptr ? ToolCallReader(tools, *tokenizer)
                                         : ToolCallReader(tools);
           }),
           py::arg("tools"), py::arg("tokenizer"))
      .def(
          "push",
          [](ToolCallReader& self, const std::string& piece, const std::vector<int32_t>& ids) {
            return self.push(piece, ids);
          },
          py::arg("piece"), py::arg("token_ids"))
      .def_property_readonly("reads_tokens", &ToolCallReader::reads_tokens)
      .def("finish", [](const ToolCallReader& self) {
        const ToolCallReader::Rest rest = self.finish();
        std::vector<std::pair<std::string, std::string>> calls;
        for (const ToolCall& call : rest.calls) calls.emplace_back(call.name, call.arguments);
        return py::make_tuple(rest.text, calls);
      });
}

}  // namespace mustafar
