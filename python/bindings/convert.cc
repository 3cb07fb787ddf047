#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <limits>
#include <memory>
#include <string>

#include "bindings.h"
#include "gil.h"
#include "mustafar/profile.h"
#include "runtime/kv_fields.h"

namespace py = pybind11;

namespace mustafar {
namespace {

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Int64Array = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// A constraint in Python: methods allow(address, n_bytes, tokens_left) and accept(token_id), and
// ended_early.
class PyConstraint final : public TokenConstraint {
 public:
  explicit PyConstraint(py::object object) : object_(std::move(object)) {}  // with the GIL
  ~PyConstraint() override {
    AcquireGil gil;
    object_ = py::object();
  }
  PyConstraint(const PyConstraint&) = delete;
  PyConstraint& operator=(const PyConstraint&) = delete;

  bool allow(std::span<uint32_t> allowed) override {
    AcquireGil gil;
    return object_
        .attr("allow")(reinterpret_cast<uintptr_t>(allowed.data()), allowed.size_bytes(),
                       tokens_left_)
        .cast<bool>();
  }
  bool accept(int32_t token) override {
    AcquireGil gil;
    return object_.attr("accept")(token).cast<bool>();
  }
  void set_tokens_left(int64_t n) override { tokens_left_ = n; }
  bool ended_early() const override {
    AcquireGil gil;
    return object_.attr("ended_early").cast<bool>();
  }

 private:
  py::object object_;
  int64_t tokens_left_ = 0;
};

// Released under the GIL, wherever the last copy dies.
std::shared_ptr<py::object> shared_object(const py::object& object) {
  return {new py::object(object), [](py::object* last) {
            AcquireGil gil;
            delete last;
          }};
}

// Taking the GIL costs microseconds, a thread in Python may hold it for 5 ms.
constexpr std::chrono::milliseconds kInterruptPeriod(20);

}  // namespace

std::vector<int32_t> token_ids_from(const py::handle& ids) {
  if (py::isinstance<py::str>(ids) || py::isinstance<py::bytes>(ids)) {
    throw py::type_error("token ids must be a sequence of integers, not text");
  }
  const py::array array = py::array::ensure(ids);
  if (!array || array.ndim() != 1) {
    PyErr_Clear();
    throw py::type_error("token ids must be a one-dimensional sequence of integers");
  }
  const char kind = array.dtype().kind();
  if (array.size() > 0 && kind != 'i' && kind != 'u') {
    throw py::type_error("token ids must be integers, not " +
                         std::string(py::str(static_cast<py::object>(array.dtype()))));
  }
  const Int64Array wide = Int64Array::ensure(array);
  std::vector<int32_t> out(wide.size());
  for (py::ssize_t i = 0; i < wide.size(); i++) {
    const int64_t id = wide.at(i);
    if (id < std::numeric_limits<int32_t>::min() || id > std::numeric_limits<int32_t>::max()) {
      throw py::value_error("token id " + std::to_string(id) + " at index " + std::to_string(i) +
                            " does not fit 32 bits");
    }
    out[i] = static_cast<int32_t>(id);
  }
  return out;
}

py::array_t<float> to_array(std::span<const float> values) {
  py::array_t<float> array(static_cast<py::ssize_t>(values.size()));
  if (!values.empty()) std::memcpy(array.mutable_data(), values.data(), values.size_bytes());
  return array;
}

py::array_t<int32_t> to_array(std::span<const int32_t> values) {
  py::array_t<int32_t> array(static_cast<py::ssize_t>(values.size()));
  if (!values.empty()) std::memcpy(array.mutable_data(), values.data(), values.size_bytes());
  return array;
}

std::function<void()> interrupt_check() {
  using Clock = std::chrono::steady_clock;
  // Shared by the sessions that are forked from one, on any thread.
  auto next = std::make_shared<std::atomic<Clock::time_point>>(Clock::now());
  return [next] {
    const auto now = Clock::now();
    if (now < next->load(std::memory_order_relaxed)) return;
    next->store(now + kInterruptPeriod, std::memory_order_relaxed);
    AcquireGil gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  };
}

std::function<void(int64_t, int64_t)> progress_reporter(const py::object& progress) {
  return [check = interrupt_check(), &progress](int64_t done, int64_t total) {
    check();
    if (progress.is_none()) return;
    AcquireGil gil;
    progress(done, total);
  };
}

KVConfig kv_fields_from(const py::dict& fields) {
  KVConfig kv;
  for_each_kv_field([&]<typename T>(const KVField<T>& field) {
    const py::object value = fields[field.name];
    if constexpr (std::is_enum_v<T>) {
      parse_kv_value(value.cast<std::string>(), kv.*field.member);
    } else {
      kv.*field.member = value.cast<T>();
    }
  });
  return kv;
}

KVConfig kv_config_from(const py::dict& fields, const Model& model) {
  KVConfig kv = kv_fields_from(fields);
  const py::object profile = fields["profile"];
  if (py::isinstance<Profile>(profile)) {
    kv.profile = profile.cast<std::shared_ptr<Profile>>();
  } else if (!profile.is_none()) {
    kv.profile = resolve_profile(profile.cast<std::string>(), model, py::none(), kv.budgeted());
  }
  return kv;
}

py::dict kv_dict(const KVConfig& kv) {
  py::dict d;
  for_each_kv_field([&]<typename T>(const KVField<T>& field) {
    if constexpr (std::is_enum_v<T>) {
      d[field.name] = name_of(kv.*field.member);
    } else {
      d[field.name] = kv.*field.member;
    }
  });
  d["profile"] = std::const_pointer_cast<Profile>(kv.profile);
  return d;
}

SamplingParams sampling_params_from(const py::dict& fields) {
  SamplingParams p;
  p.max_new_tokens = fields["max_new_tokens"].cast<int32_t>();
  p.min_new_tokens = fields["min_new_tokens"].cast<int32_t>();
  p.temperature = fields["temperature"].cast<std::optional<double>>();
  p.top_k = fields["top_k"].cast<std::optional<int32_t>>();
  p.top_p = fields["top_p"].cast<std::optional<double>>();
  p.min_p = fields["min_p"].cast<std::optional<double>>();
  p.repetition_penalty = fields["repetition_penalty"].cast<std::optional<double>>();
  p.presence_penalty = fields["presence_penalty"].cast<std::optional<double>>();
  p.frequency_penalty = fields["frequency_penalty"].cast<std::optional<double>>();
  p.penalty_window = fields["penalty_window"].cast<std::optional<int32_t>>();
  if (!fields["logit_bias"].is_none()) {
    for (const auto& [id, bias] : fields["logit_bias"].cast<py::dict>()) {
      p.logit_bias.emplace_back(id.cast<int32_t>(), bias.cast<float>());
    }
  }
  p.seed = fields["seed"].cast<std::optional<uint64_t>>();
  p.stop = fields["stop"].cast<std::vector<std::string>>();
  p.stop_token_ids = fields["stop_token_ids"].cast<std::vector<int32_t>>();
  p.ignore_eos = fields["ignore_eos"].cast<bool>();
  p.logprobs = fields["logprobs"].cast<std::optional<int32_t>>().value_or(-1);
  const py::object processor = fields["logits_processor"];
  if (!processor.is_none()) {
    p.logits_processor = [shared = shared_object(processor)](std::span<const int32_t> ids,
                                                             std::span<float> logits) {
      AcquireGil gil;
      // A view of the native buffer, valid during the call; changes in place take effect.
      const py::capsule view(logits.data(), [](void*) {});
      py::array_t<float> array({static_cast<py::ssize_t>(logits.size())}, {sizeof(float)},
                               logits.data(), view);
      const py::object returned = (*shared)(to_array(ids), array);
      if (returned.is_none()) return;
      const FloatArray replaced = FloatArray::ensure(returned);
      if (!replaced || replaced.size() != static_cast<py::ssize_t>(logits.size())) {
        throw py::value_error("logits_processor must return None or an array of " +
                              std::to_string(logits.size()) + " logits");
      }
      if (replaced.data() != logits.data()) {
        std::memcpy(logits.data(), replaced.data(), logits.size_bytes());
      }
    };
  }
  const py::object constraint = fields["constraint"];
  if (!constraint.is_none()) {
    p.constraint = [shared = shared_object(constraint)] {
      AcquireGil gil;
      return std::make_unique<PyConstraint>((*shared)());
    };
  }
  return p;
}

py::tuple to_tuple(const TokenLogprob& entry) {
  py::dict top;
  for (const auto& [id, logprob] : entry.top) top[py::int_(id)] = logprob;
  return py::make_tuple(entry.token_id, entry.logprob, top);
}

py::dict to_dict(const GenerateResult& result) {
  py::list logprobs;
  for (const TokenLogprob& entry : result.logprobs) logprobs.append(to_tuple(entry));
  py::dict stats;
  stats["prompt_tokens"] = result.stats.prompt_tokens;
  stats["cached_tokens"] = result.stats.cached_tokens;
  stats["generated_tokens"] = result.stats.generated_tokens;
  stats["repruned"] = result.stats.repruned;
  stats["prefill_seconds"] = result.stats.prefill_seconds;
  stats["decode_seconds"] = result.stats.decode_seconds;
  py::dict out;
  out["text"] = result.text;
  out["token_ids"] = result.token_ids;
  out["finish_reason"] = name_of(result.finish_reason);
  out["logprobs"] = logprobs;
  out["stats"] = stats;
  return out;
}

Prompt prompt_from(const py::handle& prompt) {
  if (py::isinstance<py::str>(prompt)) return prompt.cast<std::string>();
  return token_ids_from(prompt);
}

std::vector<Prompt> prompts_from(const py::list& prompts) {
  std::vector<Prompt> native;
  for (const py::handle prompt : prompts) native.push_back(prompt_from(prompt));
  return native;
}

}  // namespace mustafar
