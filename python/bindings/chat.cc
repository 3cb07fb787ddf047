#include "mustafar/chat.h"

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include "bindings.h"
#include "gil.h"

namespace py = pybind11;

namespace mustafar {
namespace {

// A reply keeps its chat alive.
struct PyReply {
  py::object chat;
  std::unique_ptr<ChatReply> reply;
};

// Starts a reply without the GIL. start: Chat& -> ChatReply.
template <typename Start>
PyReply begin(const py::object& self, Start&& start) {
  Chat& chat = self.cast<Chat&>();
  std::unique_ptr<ChatReply> reply;
  {
    const ReleaseGil release;
    reply = std::make_unique<ChatReply>(start(chat));
  }
  return {self, std::move(reply)};
}

}  // namespace

void register_chat(py::module_& m) {
  py::class_<Chat>(m, "Chat")
      .def(py::init([](Session& session, const std::optional<ChatTemplate>& chat_template,
                       const std::optional<std::string>& system, const std::string& tools,
                       const std::string& variables, const std::optional<std::string>& date,
                       bool context_shift) {
             ChatOptions options;
             options.chat_template = chat_template;
             options.system = system;
             options.tools = tools;
             options.variables = variables;
             options.date = date;
             options.context_shift = context_shift;
             return std::make_unique<Chat>(session, std::move(options));
           }),
           py::arg("session"), py::arg("chat_template"), py::arg("system"), py::arg("tools"),
           py::arg("variables"), py::arg("date"), py::arg("context_shift"), py::keep_alive<1, 2>())
      .def("start",
           [](const py::object& self, const std::string& text, const py::dict& params) {
             const SamplingParams sampling = sampling_params_from(params);
             return begin(self, [&](Chat& chat) { return chat.start(text, sampling); });
           })
      .def("reply",
           [](const py::object& self, const py::dict& params) {
             const SamplingParams sampling = sampling_params_from(params);
             return begin(self, [&](Chat& chat) { return chat.reply(sampling); });
           })
      .def("continue_last",
           [](const py::object& self, const py::dict& params) {
             const SamplingParams sampling = sampling_params_from(params);
             return begin(self, [&](Chat& chat) { return chat.continue_last(sampling); });
           })
      .def("keep_prompts", &Chat::keep_prompts)
      .def("regenerate",
           [](const py::object& self, const py::dict& params) {
             const SamplingParams sampling = sampling_params_from(params);
             return begin(self, [&](Chat& chat) { return chat.regenerate(sampling); });
           })
      .def(
          "fork",
          [](const Chat& chat, Session& forked) {
            return std::make_unique<Chat>(chat.fork(forked));
          },
          py::arg("forked"), py::keep_alive<0, 2>())
      .def("cancel", &Chat::cancel)
      .def("undo", &Chat::undo, py::call_guard<ReleaseGil>())
      .def("clear", &Chat::clear, py::call_guard<ReleaseGil>())
      .def("set_system", &Chat::set_system, py::call_guard<ReleaseGil>())
      .def("messages_json", &Chat::messages_json)
      .def("set_messages_json", &Chat::set_messages_json, py::call_guard<ReleaseGil>())
      .def("save", &Chat::save, py::call_guard<ReleaseGil>())
      .def("load", &Chat::load, py::call_guard<ReleaseGil>())
      .def("prompt_tokens", &Chat::prompt_tokens, py::arg("continues_last") = false,
           py::call_guard<ReleaseGil>())
      .def("end_tokens", &Chat::end_tokens)
      .def("dropped_turns", &Chat::dropped_turns);

  py::class_<PyReply>(m, "ChatReply")
      .def("step",
           [](PyReply& self) -> py::object {
             std::string piece;
             bool more = false;
             {
               const ReleaseGil release;
               more = self.reply->step(piece);
             }
             return more ? py::object(py::str(piece)) : py::object(py::none());
           })
      .def("stop", [](PyReply& self) { self.reply->stop(); })
      .def("result", [](PyReply& self) { return to_dict(self.reply->result()); })
      .def("cached_tokens", [](PyReply& self) { return self.reply->cached_tokens(); });
}

}  // namespace mustafar
