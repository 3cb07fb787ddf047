// What the binding files share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "mustafar/chat_template.h"
#include "mustafar/kv_config.h"
#include "mustafar/model.h"
#include "mustafar/profile.h"
#include "mustafar/sampling.h"

namespace mustafar {

void register_errors(pybind11::module_& m);
void register_io(pybind11::module_& m);
void register_tokenizer(pybind11::module_& m);
void register_chat_template(pybind11::module_& m);
void register_model(pybind11::module_& m);
void register_profile(pybind11::module_& m);
void register_session(pybind11::module_& m);
void register_engine(pybind11::module_& m);
void register_chat(pybind11::module_& m);
void register_tool_calls(pybind11::module_& m);
void register_format(pybind11::module_& m);
void register_weights(pybind11::module_& m);
void register_quantize(pybind11::module_& m);

// A conversation as ChatTemplate.render takes it, rendered without the GIL. continue_final_message:
// a bool, or the field of the last message.
RenderedChat render_chat(const ChatTemplate& chat_template, const pybind11::object& messages,
                         bool add_generation_prompt, const pybind11::object& continue_final_message,
                         const std::optional<std::string>& bos_token,
                         const std::optional<std::string>& eos_token, const pybind11::object& tools,
                         const pybind11::object& date, const pybind11::kwargs& variables);

// Token ids from a list, tuple or integer array of any stride; throws ValueError or TypeError.
std::vector<int32_t> token_ids_from(const pybind11::handle& ids);
// Copies to a new float32 array [values.size()].
pybind11::array_t<float> to_array(std::span<const float> values);
pybind11::array_t<int32_t> to_array(std::span<const int32_t> values);

// A check for Ctrl-C that native loops may call often, without the GIL: it looks at most every 20
// ms and throws what the Python signal handler raised.
std::function<void()> interrupt_check();

// The same for work that tells how far it is, and hands that to progress (a callable or None, which
// must outlive it).
std::function<void(int64_t, int64_t)> progress_reporter(const pybind11::object& progress);

// Profile::resolve without the GIL: Ctrl-C ends it, progress (a callable or None) is told of
// tokens, and notes go to logging's "mustafar".
std::shared_ptr<Profile> resolve_profile(const std::string& name, const Model& model,
                                         const pybind11::object& progress, bool costs);

// From the keyword dictionaries that the Python classes make of themselves.
KVConfig kv_fields_from(const pybind11::dict& fields);  // all but the profile
KVConfig kv_config_from(const pybind11::dict& fields, const Model& model);
pybind11::dict kv_dict(const KVConfig& kv);
SamplingParams sampling_params_from(const pybind11::dict& fields);
pybind11::tuple to_tuple(const TokenLogprob& entry);
pybind11::dict to_dict(const GenerateResult& result);
Prompt prompt_from(const pybind11::handle& prompt);
std::vector<Prompt> prompts_from(const pybind11::list& prompts);

}  // namespace mustafar
