#include "mustafar/session.h"

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include "bindings.h"
#include "gil.h"
#include "mustafar/profile.h"
#include "runtime/kv_fields.h"
#include "runtime/session_impl.h"

namespace py = pybind11;

namespace mustafar {
namespace {

py::dict cache_memory(const Session& session) {
  const MemoryUsage usage = session.memory();
  py::dict d;
  d["dense_equivalent"] = usage.dense_equivalent;
  d["masks"] = usage.masks;
  d["values"] = usage.values;
  d["scales"] = usage.scales;
  d["padding"] = usage.padding;
  d["tail"] = usage.tail;
  d["policy"] = usage.policy;
  d["allocated"] = usage.allocated;
  d["used"] = usage.used;
  d["compressed_tokens"] = usage.compressed_tokens;
  d["dense_tokens"] = usage.dense_tokens;
  d["k_sparsity"] = usage.k_sparsity;
  d["v_sparsity"] = usage.v_sparsity;
  return d;
}

std::unique_ptr<Session> make_session(const Model& model, const py::dict& kv,
                                      std::optional<int32_t> max_tokens) {
  auto session = std::make_unique<Session>(model, kv_config_from(kv, model), max_tokens);
  session->set_interrupt_check(interrupt_check());
  return session;
}

// Runs body without the GIL as one call of the session's, in which the logits it returns are
// copied: a call from another thread would write over them.
template <typename Body>
py::array_t<float> logits_of(Session& session, Body&& body) {
  Session::Impl& impl = session.impl();
  ReleaseGil release;
  const Session::Impl::Use use(impl);
  const std::span<const float> logits = body(impl);
  AcquireGil acquire;
  return to_array(logits);
}

// A generation keeps its session alive.
struct PyGeneration {
  py::object session;
  std::unique_ptr<Generation> generation;
};

}  // namespace

void register_session(py::module_& m) {
  m.def(
      "kv_preset",
      [](const std::string& name) {
        const KVPreset& preset = find_kv_preset(name);
        py::dict fields = kv_dict(preset.config);
        const std::string profile = preset.profile;
        fields["profile"] = profile == "none" ? py::object(py::none()) : py::str(profile);
        return fields;
      },
      py::arg("name"));
  m.def(
      "check_kv", [](const py::dict& fields) { kv_fields_from(fields).validate(); },
      py::arg("fields"));
  m.def("kv_presets", [] {
    py::dict summaries;
    for (const KVPreset& preset : kv_presets()) summaries[preset.name] = preset.summary;
    return summaries;
  });
  m.def("kv_options", [] {  // of every field: its name, its option of the command line, its help
    py::list options;
    for_each_kv_field([&options](const auto& field) {
      options.append(py::make_tuple(field.name, field.option, field.help));
    });
    return options;
  });
  py::class_<Session>(m, "Session")
      .def(py::init(&make_session), py::arg("model"), py::arg("kv"), py::arg("max_tokens"))
      .def("prefill",
           [](Session& session, const py::object& ids) {
             const std::vector<int32_t> tokens = token_ids_from(ids);
             return logits_of(session,
                              [&](Session::Impl& impl) { return impl.prefill(tokens, {}); });
           })
      .def("decode",
           [](Session& session, int32_t token_id) {
             return logits_of(session, [&](Session::Impl& impl) { return impl.decode(token_id); });
           })
      .def_static("decode_batch",
                  [](const std::vector<Session*>& sessions, const py::object& ids) {
                    const std::vector<int32_t> tokens = token_ids_from(ids);
                    std::vector<float> logits;
                    {
                      ReleaseGil release;
                      logits = Session::decode_batch(sessions, tokens);
                    }
                    const auto n = static_cast<py::ssize_t>(sessions.size());
                    return to_array(std::span<const float>(logits)).reshape({n, py::ssize_t{-1}});
                  })
      .def("logits",
           [](Session& session) {
             return logits_of(session, [](Session::Impl& impl) { return impl.logits(); });
           })
      .def("generate",
           [](Session& session, const py::object& prompt, const py::dict& params,
              bool parse_special) {
             const Prompt native = prompt_from(prompt);
             const SamplingParams sampling = sampling_params_from(params);
             GenerateResult result;
             {
               ReleaseGil release;
               result = session.generate(native, sampling, {},
                                         PromptOptions{.parse_special = parse_special});
             }
             return to_dict(result);
           })
      .def("start",
           [](const py::object& self, const py::object& prompt, const py::dict& params,
              bool parse_special) {
             Session& session = self.cast<Session&>();
             const Prompt native = prompt_from(prompt);
             const SamplingParams sampling = sampling_params_from(params);
             ReleaseGil release;
             auto generation = std::make_unique<Generation>(
                 session.start(native, sampling, PromptOptions{.parse_special = parse_special}));
             AcquireGil acquire;
             return PyGeneration{self, std::move(generation)};
           })
      .def("score",
           [](Session& session, const py::object& ids) {
             const std::vector<int32_t> tokens = token_ids_from(ids);
             std::vector<float> scores;
             {
               ReleaseGil release;
               scores = session.score(tokens);
             }
             return to_array(std::span<const float>(scores));
           })
      .def("score_logits",
           [](Session& session, const py::object& ids) {
             const std::vector<int32_t> tokens = token_ids_from(ids);
             const int64_t vocab = session.model().config().vocab_size;
             std::vector<float> all;
             {
               ReleaseGil release;
               session.score_logits(tokens, [&](int64_t, std::span<const float> logits) {
                 all.insert(all.end(), logits.begin(), logits.end());
               });
             }
             return to_array(std::span<const float>(all)).reshape({py::ssize_t{-1}, vocab});
           })
      .def("position", &Session::position)
      .def("tokens", &Session::tokens)
      .def("max_tokens", &Session::max_tokens)
      .def("memory", &cache_memory)
      .def("rewind", &Session::rewind, py::call_guard<ReleaseGil>())
      .def("fork",
           [](const Session& session) {
             ReleaseGil release;
             return std::make_unique<Session>(session.fork());
           })
      .def("save",
           [](const Session& session, const std::filesystem::path& file) {
             ReleaseGil release;
             session.save(file);
           })
      .def_static(
          "load",
          [](const Model& model, const std::filesystem::path& file,
             std::shared_ptr<Profile> profile) {
            auto session = [&] {
              ReleaseGil release;
              return std::make_unique<Session>(Session::load(model, file, profile));
            }();
            session->set_interrupt_check(interrupt_check());
            return session;
          },
          py::arg("model"), py::arg("file"), py::arg("profile"))
      .def("kv", [](const Session& session) { return kv_dict(session.kv_config()); })
      .def("reset", &Session::reset, py::call_guard<ReleaseGil>())
      .def("close", &Session::close, py::call_guard<ReleaseGil>())
      .def("cancel", &Session::cancel);

  py::class_<PyGeneration>(m, "Generation")
      .def("step",
           [](PyGeneration& self) -> py::object {
             std::string piece;
             bool more;
             {
               ReleaseGil release;
               more = self.generation->step(piece);
             }
             return more ? py::object(py::str(piece)) : py::object(py::none());
           })
      .def("stop", [](PyGeneration& self) { self.generation->stop(); })
      .def("result", [](PyGeneration& self) { return to_dict(self.generation->result()); });
}

}  // namespace mustafar
