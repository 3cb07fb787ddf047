// Many prompts at a time: the scheduler's rounds on the calling thread.
#include <stdexcept>
#include <string>
#include <utility>

#include "mustafar/error.h"
#include "mustafar/model.h"
#include "runtime/model_impl.h"
#include "runtime/scheduler.h"

namespace mustafar {
namespace {

// The same error, with the prompt's name where it says what is short.
std::exception_ptr named(std::exception_ptr error, const std::string& name) {
  try {
    std::rethrow_exception(std::move(error));
  } catch (const OutOfMemory& short_of) {
    return std::make_exception_ptr(OutOfMemory(name + ": " + short_of.what()));
  } catch (...) {
    return std::current_exception();
  }
}

// engine: keeps the model while the call runs. params: one for each prompt, or one for all.
std::vector<GenerateResult> run_batch(const std::shared_ptr<Model::Impl>& engine,
                                      std::span<const Prompt> prompts,
                                      std::span<const SamplingParams> params, const KVConfig& kv,
                                      const BatchOptions& options) {
  Scheduler scheduler(*engine, kv,
                      {.max_batch = options.max_batch, .between = options.interrupt_check});
  std::vector<GenerateResult> results(prompts.size());
  std::exception_ptr error;
  for (size_t i = 0; i < prompts.size(); i++) {
    const std::string name = "prompt " + std::to_string(i);
    const std::shared_ptr<Job> job =
        make_job(*engine, prompts[i], params[params.size() == 1 ? 0 : i], options.parse_special,
                 /*own_text=*/false, name);
    job->order = i;
    job->on_end = [&, i, name, loop = job->loop.get()](std::exception_ptr failed) {
      if (failed == nullptr) {
        results[i] = std::move(loop->result);
      } else if (error == nullptr) {
        error = named(std::move(failed), name);
      }
    };
    scheduler.add(job);
  }
  while (!scheduler.idle()) {
    scheduler.round();
    if (error != nullptr) std::rethrow_exception(error);
  }
  return results;
}

}  // namespace

std::vector<GenerateResult> Model::generate(std::span<const Prompt> prompts,
                                            const SamplingParams& params, const KVConfig& kv,
                                            const BatchOptions& options) const {
  const SamplingParams all[] = {params};
  return run_batch(impl(), prompts, all, kv, options);
}

std::vector<GenerateResult> Model::generate(std::span<const Prompt> prompts,
                                            std::span<const SamplingParams> params,
                                            const KVConfig& kv, const BatchOptions& options) const {
  if (params.size() != prompts.size()) {
    throw std::invalid_argument("params has " + std::to_string(params.size()) + " elements for " +
                                std::to_string(prompts.size()) + " prompts");
  }
  return run_batch(impl(), prompts, params, kv, options);
}

}  // namespace mustafar
