#include "mustafar/tokenizer.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <string_view>

#include "bindings.h"
#include "gil.h"

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

// None: the tokenizer's own; a name or a file; or a ChatTemplate.
ChatTemplate chat_template_from(const Tokenizer& tokenizer, const py::object& given) {
  if (given.is_none()) return tokenizer.chat_template();
  if (py::isinstance<ChatTemplate>(given)) return given.cast<ChatTemplate>();
  return tokenizer.chat_template(
      py::module_::import("os").attr("fsdecode")(given).cast<std::string>());
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
             ReleaseGil release;
             return Tokenizer::load(name);
           }),
           py::arg("path"), "Reads a tokenizer.json, or the one in a folder.")
      .def(
          "encode",
          [](const Tokenizer& self, const py::str& text, bool add_special, bool parse_special) {
            const std::string_view utf8 = utf8_of(text);
            ReleaseGil release;
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
              ReleaseGil release;
              text = self.decode(native, skip_special);
            }
            return text;
          },
          py::arg("token_ids"), py::arg("skip_special") = false, R"(
Text of token ids, a sequence or an integer array. An id that is no token, as in the padding of a
model's vocabulary, has no text. Raises TokenizerError for a negative one.)")
      .def(
          "apply_chat_template",
          [](const Tokenizer& self, const py::object& messages,
             std::optional<bool> add_generation_prompt, const py::object& continue_final_message,
             bool tokenize, const py::object& tools, const py::object& chat_template,
             const std::optional<std::string>& bos_token,
             const std::optional<std::string>& eos_token, const py::object& date,
             const py::kwargs& variables) -> py::object {
            const ChatTemplate chosen = chat_template_from(self, chat_template);
            const bool continues = py::cast<bool>(py::bool_(continue_final_message));
            const RenderedChat rendered =
                render_chat(chosen, messages, add_generation_prompt.value_or(!continues),
                            continue_final_message, bos_token, eos_token, tools, date, variables);
            if (!tokenize) return py::str(rendered.text);
            std::vector<int32_t> ids;
            {
              ReleaseGil release;
              ids = self.encode_chat(rendered.text, rendered.outside);
            }
            return py::cast(ids);
          },
          py::arg("messages"), py::arg("add_generation_prompt") = py::none(), py::kw_only(),
          py::arg("continue_final_message") = false, py::arg("tokenize") = true,
          py::arg("tools") = py::none(), py::arg("chat_template") = py::none(),
          py::arg("bos_token") = py::none(), py::arg("eos_token") = py::none(),
          py::arg("date") = py::none(), R"(
Token ids of a conversation as the model expects it: the chat template rendered, its special tokens
as their ids. A special token that a message spells stays text.

messages: dicts with "role" and "content". add_generation_prompt: end with what starts the
assistant's turn; None: unless continue_final_message. continue_final_message: end inside the last
message instead, so that the reply continues it; True, or the name of another field of the message
than "content"; ValueError where the template leaves that out. tokenize: False gives the text
instead. tools: a list of tool definitions.
chat_template: a ChatTemplate, or the name of a built-in one or a file; None is the one beside
tokenizer.json. bos_token, eos_token: None for those of the template's folder. date: what
strftime_now prints, a str (ISO), date or datetime; None for now. Further keyword arguments are
variables of the template. Raises TemplateError where there is no template or it refuses the
conversation, and TypeError or ValueError for values that JSON does not have.)")
      .def(
          "stream",
          [](const Tokenizer& self, bool skip_special, const py::object& after) {
            return Tokenizer::Stream(self, skip_special, token_ids_from(after));
          },
          py::arg("skip_special") = true, py::arg("after") = py::tuple(), R"(
An incremental decoder. after: ids that come before the first one pushed; the text is then what
follows theirs.)")
      .def_property_readonly("vocab_size", &Tokenizer::vocab_size,
                             "One more than the largest id, added tokens included.")
      .def_property_readonly("bos_id", &Tokenizer::bos_id,
                             "Id of the token that begins a text, or None.")
      .def_property_readonly("eos_ids", &Tokenizer::eos_ids,
                             "Ids of the tokens that end a text, the tokenizer's own first.")
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
      .def(
          "token_bytes",
          [](const Tokenizer& self, int32_t token_id) {
            return py::bytes(self.token_bytes(token_id));
          },
          py::arg("token_id"), R"(
The bytes that a token adds to a text in whose midst it stands, which need not be whole characters;
a special token's are its spelling. Raises TokenizerError for an id that is none.)")
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
