#include <exception>
#include <new>
#include <string>
#include <string_view>

#include "bindings.h"
#include "mustafar/error.h"

namespace py = pybind11;

namespace mustafar {
namespace {

// As py::register_exception, but for messages with bytes that are not UTF-8 (a file's name may be
// anything), which Python's own conversion would answer with a UnicodeDecodeError.
template <typename E>
py::handle register_error(py::module_& m, const char* name, py::handle base) {
  static py::handle type;  // lives as long as the process, as extension modules do
  type = py::exception<E>(m, name, base).release();
  static py::handle missing;  // of a file that is not there
  const py::tuple bases = py::make_tuple(type, py::handle(PyExc_FileNotFoundError));
  const std::string missing_name = std::string("mustafar.") + name;
  missing = PyErr_NewException(missing_name.c_str(), bases.ptr(), nullptr);
  if (!missing) throw py::error_already_set();
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const E& error) {
      const std::string_view text = error.what();
      PyObject* message = PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()),
                                               "backslashreplace");
      if (message == nullptr) return;  // out of memory: that error is set
      const bool is_missing = dynamic_cast<const MissingFile*>(&error) != nullptr;
      PyErr_SetObject((is_missing ? missing : type).ptr(), message);
      Py_DECREF(message);
    }
  });
  return type;
}

}  // namespace

void register_errors(py::module_& m) {
  // The base first: translators registered later are asked first.
  const py::handle base = register_error<Error>(m, "Error", PyExc_RuntimeError);
  register_error<ModelError>(m, "ModelError", base);
  register_error<TokenizerError>(m, "TokenizerError", base);
  register_error<TemplateError>(m, "TemplateError", base);
  static py::handle out_of_memory;
  out_of_memory = register_error<OutOfMemory>(m, "OutOfMemory", base);
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const std::bad_alloc&) {
      PyErr_SetString(out_of_memory.ptr(), "the host has no memory left");
    }
  });
  register_error<ContextOverflow>(m, "ContextOverflow", base);
  register_error<DeviceError>(m, "DeviceError", base);
  register_error<StateError>(m, "StateError", base);
  register_error<Cancelled>(m, "Cancelled", base);
  register_error<QueueFull>(m, "QueueFull", base);
}

}  // namespace mustafar
