#include "mustafar/chat_template.h"

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include "bindings.h"
#include "gil.h"
#include "text/chat_template_impl.h"

namespace py = pybind11;

namespace mustafar {
namespace {

using jinja::Value;

// Deeper values are refused before they exhaust the stack.
constexpr int kDeepestValue = 100;

// A Python object as the engine's value: None, bool, int, float, str, list, tuple and dict. Strings
// are marked as from outside the template.
Value value_from(const py::handle& object, int depth = 0) {
  if (depth > kDeepestValue) {
    throw py::value_error("chat template: the values nest deeper than " +
                          std::to_string(kDeepestValue) + " levels");
  }
  if (object.is_none()) return {};
  PyObject* p = object.ptr();
  if (PyBool_Check(p)) return Value(p == Py_True);
  if (PyLong_Check(p)) {
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(p, &overflow);
    if (overflow) {
      throw py::value_error("chat template: an integer beyond 64 bits is not supported");
    }
    return Value(static_cast<int64_t>(number));
  }
  if (PyFloat_Check(p)) return Value(PyFloat_AsDouble(p));
  if (PyUnicode_Check(p)) {
    Py_ssize_t size = 0;
    const char* utf8 = PyUnicode_AsUTF8AndSize(p, &size);
    if (!utf8) throw py::error_already_set();  // a lone surrogate: UnicodeEncodeError
    return Value(jinja::Text(std::string_view(utf8, static_cast<size_t>(size)), true));
  }
  if (PyDict_Check(p)) {
    auto dict = std::make_shared<jinja::Dict>();
    jinja::Budget budget{.steps = INT64_MAX, .max_bytes = SIZE_MAX, .max_depth = 1};
    for (const auto& [key, item] : py::reinterpret_borrow<py::dict>(object)) {
      dict->set(value_from(key, depth + 1), value_from(item, depth + 1), budget);
    }
    return Value(std::shared_ptr<const jinja::Dict>(std::move(dict)));
  }
  if (PyList_Check(p) || PyTuple_Check(p)) {
    std::vector<Value> items;
    for (const auto& item : py::reinterpret_borrow<py::sequence>(object)) {
      items.push_back(value_from(item, depth + 1));
    }
    return Value::list(std::move(items), PyTuple_Check(p));
  }
  throw py::type_error(
      "chat template: a value of type '" +
      py::type::of(object).attr("__name__").cast<std::string>() +
      "' is not supported; expected None, bool, int, float, str, list, tuple or dict");
}

// None, a str, a date or a datetime.
std::optional<std::string> date_from(const py::object& date) {
  if (date.is_none()) return std::nullopt;
  if (py::isinstance<py::str>(date)) return date.cast<std::string>();
  if (py::hasattr(date, "strftime")) {
    return date.attr("strftime")(py::hasattr(date, "hour") ? "%Y-%m-%dT%H:%M:%S" : "%Y-%m-%d")
        .cast<std::string>();
  }
  throw py::type_error("date: expected None, a str, a date or a datetime");
}

// True is the content.
std::string continued_field(const py::object& given) {
  if (py::isinstance<py::str>(given)) return given.cast<std::string>();
  if (!py::isinstance<py::bool_>(given)) {
    throw py::type_error("continue_final_message must be True, False or the name of a field");
  }
  return given.cast<bool>() ? "content" : "";
}

}  // namespace

RenderedChat render_chat(const ChatTemplate& chat_template, const py::object& messages,
                         bool add_generation_prompt, const py::object& continue_final_message,
                         const std::optional<std::string>& bos_token,
                         const std::optional<std::string>& eos_token, const py::object& tools,
                         const py::object& date, const py::kwargs& variables) {
  ChatTemplateOptions options;
  options.add_generation_prompt = add_generation_prompt;
  options.continue_final_message = continued_field(continue_final_message);
  options.bos_token = bos_token;
  options.eos_token = eos_token;
  options.date = date_from(date);
  TemplateVariables values;
  for (const auto& [name, value] : variables) {
    values.emplace_back(name.cast<std::string>(), value_from(value));
  }
  const Value message_values = value_from(messages), tool_values = value_from(tools);
  const ReleaseGil release;
  return render_values(chat_template.impl(), message_values, tool_values, values, options);
}

void register_chat_template(py::module_& m) {
  py::class_<ChatTemplate>(m, "ChatTemplate", R"(A chat template, run by a native Jinja engine.

Renders as transformers does with jinja2, in a sandbox with bounds on steps, text and nesting.
Raises TemplateError naming the line for a template that does not parse or fails.)")
      .def(py::init([](const std::string& source) { return ChatTemplate::parse(source); }),
           py::arg("source"))
      .def_static("from_folder", &ChatTemplate::from_folder, py::arg("folder"),
                  py::arg("name") = "",
                  "The template of a Hugging Face folder, with its special tokens.")
      .def_static("from_argument", &ChatTemplate::from_argument, py::arg("argument"),
                  py::arg("folder") = "",
                  "What --chat-template names: a built-in template or a file.")
      .def_static("builtin", &ChatTemplate::builtin, py::arg("name"),
                  "A template that comes with mustafar; see builtin_names().")
      .def_static("builtin_names", &ChatTemplate::builtin_names)
      .def("__repr__",
           [](const ChatTemplate& self) {
             return "<mustafar.ChatTemplate of " + std::to_string(self.source().size()) + " bytes>";
           })
      .def_property_readonly("source", &ChatTemplate::source)
      .def(
          "render",
          [](const ChatTemplate& self, const py::object& messages, bool add_generation_prompt,
             const std::optional<std::string>& bos_token,
             const std::optional<std::string>& eos_token, const py::object& tools,
             const py::object& date, const py::object& continue_final_message,
             const py::kwargs& variables) {
            return render_chat(self, messages, add_generation_prompt, continue_final_message,
                               bos_token, eos_token, tools, date, variables)
                .text;
          },
          py::arg("messages"), py::arg("add_generation_prompt") = false,
          py::arg("bos_token") = py::none(), py::arg("eos_token") = py::none(),
          py::arg("tools") = py::none(), py::arg("date") = py::none(), py::kw_only(),
          py::arg("continue_final_message") = false,
          R"(The prompt for a list of messages, dicts with "role" and "content".

bos_token, eos_token: None for those of the template's folder, or "". tools: a list of tool
definitions. date: what strftime_now prints, a str (ISO), date or datetime; None for now.
continue_final_message: end inside the last message, so that the reply continues it; True, or the
name of another field of the message than "content"; ValueError where the template leaves that out.
Further keyword arguments are variables of the template. Raises TemplateError, and TypeError or
ValueError for values that JSON does not have.)")
      .def(
          "render_marked",
          [](const ChatTemplate& self, const py::object& messages, bool add_generation_prompt,
             const std::optional<std::string>& bos_token,
             const std::optional<std::string>& eos_token, const py::object& tools,
             const py::object& date, const py::object& continue_final_message,
             const py::kwargs& variables) {
            const RenderedChat rendered =
                render_chat(self, messages, add_generation_prompt, continue_final_message,
                            bos_token, eos_token, tools, date, variables);
            py::list ranges;
            for (const TextRange& range : rendered.outside) {
              ranges.append(py::make_tuple(range.begin, range.end));
            }
            return py::make_tuple(rendered.text, ranges);
          },
          py::arg("messages"), py::arg("add_generation_prompt") = false,
          py::arg("bos_token") = py::none(), py::arg("eos_token") = py::none(),
          py::arg("tools") = py::none(), py::arg("date") = py::none(), py::kw_only(),
          py::arg("continue_final_message") = false,
          R"(As render, with the (begin, end) byte ranges of the text that came from the caller.)");
}

}  // namespace mustafar
