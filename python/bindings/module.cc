// The native module behind the mustafar package: one register function per topic.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "gil.h"
#include "mustafar/version.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "Native part of mustafar; use the mustafar package instead.";
  m.attr("version") = MUSTAFAR_VERSION;
  mustafar::register_gil();
  mustafar::register_errors(m);
  mustafar::register_io(m);
  mustafar::register_tokenizer(m);
  mustafar::register_chat_template(m);
  mustafar::register_profile(m);
  mustafar::register_model(m);
  mustafar::register_session(m);
  mustafar::register_engine(m);
  mustafar::register_chat(m);
  mustafar::register_tool_calls(m);
  mustafar::register_format(m);
  mustafar::register_weights(m);
  mustafar::register_quantize(m);
}
