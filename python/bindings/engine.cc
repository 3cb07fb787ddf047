#include "mustafar/engine.h"

#include <pybind11/stl.h>

#include <condition_variable>
#include <mutex>
#include <set>

#include "bindings.h"
#include "core/fork.h"
#include "gil.h"

namespace py = pybind11;

namespace mustafar {
namespace {

// Keys of requests that have changed, for one thread in Python to wait on: so asyncio is told
// without the engine's thread ever waiting for the GIL. A forked child, which has neither thread,
// finds it closed.
class Changes {
 public:
  void add(int64_t key) {
    if (is_elsewhere()) return;
    {
      std::lock_guard lock(mutex_);
      keys_.insert(key);
    }
    changed_.notify_one();
  }

  void close() {
    if (is_elsewhere()) return;
    {
      std::lock_guard lock(mutex_);
      closed_ = true;
    }
    changed_.notify_all();
  }

  // Some keys, each once; empty once closed. The caller has released the GIL.
  std::vector<int64_t> wait() {
    if (is_elsewhere()) return {};
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return closed_ || !keys_.empty(); });
    if (closed_) return {};
    std::vector<int64_t> keys(keys_.begin(), keys_.end());
    keys_.clear();
    return keys;
  }

 private:
  // The mutex may be locked for ever then.
  bool is_elsewhere() const { return forks_ != forks_so_far(); }

  const int forks_ = forks_so_far();
  std::mutex mutex_;
  std::condition_variable changed_;
  std::set<int64_t> keys_;
  bool closed_ = false;
};

// The engine's thread may need the GIL before it ends.
struct DeleteWithoutGil {
  void operator()(Engine* engine) const {
    ReleaseGil release;
    delete engine;
  }
};

std::unique_ptr<Engine, DeleteWithoutGil> make_engine(
    const Model& model, const py::dict& kv, int32_t max_batch, int32_t max_waiting,
    int32_t prefill_tokens, const std::string& prefix_cache, std::optional<int64_t> prefix_bytes,
    const std::string& on_pressure, int64_t swap_bytes) {
  EngineOptions options;
  options.max_batch = max_batch;
  options.max_waiting = max_waiting;
  options.prefill_tokens = prefill_tokens;
  options.prefix_cache = parse_prefix_cache(prefix_cache);
  options.prefix_bytes = prefix_bytes;
  options.on_pressure = parse_on_pressure(on_pressure);
  options.swap_bytes = swap_bytes;
  const KVConfig config = kv_config_from(kv, model);
  ReleaseGil release;
  return std::unique_ptr<Engine, DeleteWithoutGil>(new Engine(model, config, options));
}

Request submit(Engine& engine, const py::object& prompt, const py::dict& params, int32_t priority,
               std::optional<double> timeout, bool parse_special, bool own_text,
               std::vector<int64_t> prefixes) {
  const Prompt native = prompt_from(prompt);
  const SamplingParams sampling = sampling_params_from(params);
  RequestOptions options;
  options.priority = priority;
  options.timeout_seconds = timeout;
  options.parse_special = parse_special;
  options.own_text = own_text;
  options.prefixes = std::move(prefixes);
  ReleaseGil release;
  return engine.submit(native, sampling, options);
}

int64_t pin(Engine& engine, const py::object& prefix, bool parse_special) {
  const Prompt native = prompt_from(prefix);
  ReleaseGil release;
  return engine.pin(native, parse_special);
}

bool unpin(Engine& engine, const py::object& prefix, bool parse_special) {
  const Prompt native = prompt_from(prefix);
  ReleaseGil release;
  return engine.unpin(native, parse_special);
}

py::dict result(const Request& request) {
  GenerateResult made;
  try {
    ReleaseGil release;
    made = request.result();
  } catch (py::error_already_set& error) {
    // Of a logits processor. An error that was caught can be raised once; this one may be asked for
    // again.
    const py::object value = error.value();
    PyErr_SetObject(py::type::handle_of(value).ptr(), value.ptr());
    throw py::error_already_set();
  }
  return to_dict(made);
}

// (id, end of its text in bytes, its log-probabilities or None) of every token from an index on.
py::list tokens_from(const Request& request, size_t index) {
  py::list tokens;
  for (const MadeToken& made : request.tokens_from(index)) {
    const py::object logprob = made.logprob ? py::object(to_tuple(*made.logprob)) : py::none();
    tokens.append(py::make_tuple(made.token_id, made.text_end, logprob));
  }
  return tokens;
}

py::dict stats_dict(const Engine& engine) {
  const EngineStats stats = engine.stats();
  py::dict d;
  d["running"] = stats.running;
  d["waiting"] = stats.waiting;
  d["paused"] = stats.paused;
  d["repruned"] = stats.repruned;
  d["kv_bytes"] = stats.kv_bytes;
  d["finished"] = stats.finished;
  d["cancelled"] = stats.cancelled;
  d["failed"] = stats.failed;
  d["generated_tokens"] = stats.generated_tokens;
  d["prompt_tokens"] = stats.prompt_tokens;
  d["reused_tokens"] = stats.reused_tokens;
  d["prefixes"] = stats.prefixes;
  d["prefix_bytes"] = stats.prefix_bytes;
  d["swap_bytes"] = stats.swap_bytes;
  return d;
}

}  // namespace

void register_engine(py::module_& m) {
  py::class_<Changes, std::shared_ptr<Changes>>(m, "Changes")
      .def(py::init([] { return std::shared_ptr<Changes>(new Changes, DeleteInOwnProcess()); }))
      .def("wait", &Changes::wait, py::call_guard<ReleaseGil>())
      .def("close", &Changes::close);

  py::class_<Request>(m, "Request")
      .def("cancel", &Request::cancel)
      .def("done", &Request::done)
      .def("prompt_tokens", &Request::prompt_tokens)
      .def("text_from", &Request::text_from, py::arg("offset"), py::arg("seconds"),
           py::call_guard<ReleaseGil>())
      .def("tokens_from", &tokens_from, py::arg("index"))
      .def("wait", &Request::wait, py::arg("seconds"), py::call_guard<ReleaseGil>())
      .def("result", &result)
      .def("listen", [](Request& request, const std::shared_ptr<Changes>& changes, int64_t key) {
        ReleaseGil release;
        request.set_on_change([changes, key] { changes->add(key); });
      });

  py::class_<Engine, std::unique_ptr<Engine, DeleteWithoutGil>>(m, "Engine")
      .def(py::init(&make_engine), py::arg("model"), py::arg("kv"), py::arg("max_batch"),
           py::arg("max_waiting"), py::arg("prefill_tokens"), py::arg("prefix_cache"),
           py::arg("prefix_bytes"), py::arg("on_pressure"), py::arg("swap_bytes"))
      .def("submit", &submit, py::arg("prompt"), py::arg("params"), py::arg("priority"),
           py::arg("timeout"), py::arg("parse_special"), py::arg("own_text"), py::arg("prefixes"))
      .def("pin", &pin, py::arg("prefix"), py::arg("parse_special"))
      .def("unpin", &unpin, py::arg("prefix"), py::arg("parse_special"))
      .def("stats", &stats_dict)
      .def("close", &Engine::close, py::call_guard<ReleaseGil>());
}

}  // namespace mustafar
