#include "mustafar/tokenizer.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <string_view>

#include "bindings.h"

namespace py = pybind11;

namespace mustafar {

namespace {

// UTF-8 of a str; raises UnicodeEncodeError, a ValueError, for one with lone surrogates. Valid as
// long as the str is.
std::string_view utf8_of(const py::str& text) {
  Py_ssize_t size = 0;
  const char* bytes = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
  if (!bytes) throw py::error_already_set();
  return {bytes, static_cast<size_t>(size)};
}

}  // namespace

void register_tokenizer(py::module_& m) {
  py::class_<Tokenizer> tokenizer(m, "Tokenizer", R"(
Text to token ids and back, from a Hugging Face tokenizer.json.

Immutable; one may be used by several threads. Raises TokenizerError, naming file and field, for a
file that can't be used.)");
  py::class_<Tokenizer::Stream> stream(m, "TokenizerStream", R"(
Decodes ids one by one, holding back what is not certain yet, such as half a character. The pieces
and the flush together equal decode() of all the ids.)");

  tokenizer
      .def(py::init([](const py::object& path) {
             const auto name = py::module_::import("os").attr("fsencode")(path).cast<std::string>();
             py::gil_scoped_release release;
             return Tokenizer::load(name);
           }),
           py::arg("path"), "Reads a tokenizer.json, or the one in a folder.")
      .def(
          "encode",
          [](const Tokenizer& self, const py::str& text, bool add_special, bool parse_special) {
            const std::string_view utf8 = utf8_of(text);
            py::gil_scoped_release release;
            return self.encode(utf8, add_special, parse_special);
          },
          py::arg("text"), py::arg("add_special") = true, py::arg("parse_special") = false, R"(
Token ids of a text.

add_special: with what the tokenizer puts around a text, such as BOS. parse_special: special tokens
spelled in the text become their id; otherwise they are text like any other. Raises ValueError for a
str with lone surrogates.)")
      .def(
          "decode",
          [](const Tokenizer& self, const py::object& ids, bool skip_special) {
            const std::vector<int32_t> native = token_ids_from(ids);
            std::string text;
            {
              py::gil_scoped_release release;
              text = self.decode(native, skip_special);
            }
            return text;
          },
          py::arg("token_ids"), py::arg("skip_special") = false, R"(
Text of token ids, a sequence or an integer array. Raises TokenizerError for an id that is no
token.)")
      .def(
          "stream",
          [](const Tokenizer& self, bool skip_special) {
            return Tokenizer::Stream(self, skip_special);
          },
          py::arg("skip_special") = true, "An incremental decoder.")
      .def_property_readonly("vocab_size", &Tokenizer::vocab_size,
                             "One more than the largest id, added tokens included.")
      .def_property_readonly("special_prefix", &Tokenizer::special_prefix,
                             "Ids that add_special puts before a text, such as BOS.")
      .def(
          "token_to_id",
          [](const Tokenizer& self, const py::str& token) {
            return self.token_to_id(utf8_of(token));
          },
          py::arg("token"), "Id of a token as spelled in tokenizer.json, or None.")
      .def("id_to_token", &Tokenizer::id_to_token, py::arg("token_id"),
           "A token as spelled in tokenizer.json. Raises TokenizerError for an id that is none.")
      .def("is_special", &Tokenizer::is_special, py::arg("token_id"),
           "Whether an id is a special token, which decode can skip.")
      .def("__repr__", [](const Tokenizer& self) {
        return "<mustafar.Tokenizer with " + std::to_string(self.vocab_size()) + " ids>";
      });

  stream
      .def("push", &Tokenizer::Stream::push, py::arg("token_id"),
           "Text that became certain with one more id, often one token's or none.")
      .def("flush", &Tokenizer::Stream::flush, "What was held back; the stream is then as new.");
}

}  // namespace mustafar
