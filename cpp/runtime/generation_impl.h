// What a Generation holds, for the library's own use.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>

#include "core/fork.h"
#include "mustafar/session.h"
#include "runtime/session_impl.h"
#include "runtime/token_loop.h"

namespace mustafar {

struct Generation::Impl {
  const std::shared_ptr<Session::Impl> session;
  // Called once, inside the call that ends it, or after the session was closed.
  std::function<void()> at_end;

  Impl(std::shared_ptr<Session::Impl> session, const SamplingParams& params);
  ~Impl() { session->ownership.take_from(this); }
  Impl(const Impl&) = delete;

  // Works on the prompt. This and make_token() belong inside a call of the session's.
  static std::unique_ptr<Impl> begin(const std::shared_ptr<Session::Impl>& session,
                                     const Prompt& prompt, const SamplingParams& params,
                                     const PromptOptions& options);
  // Between calls the session is this generation's from now on, unless it has ended already.
  void own_session();
  // False when it has ended.
  bool make_token(std::string& piece);

  // As Generation's; calls of their own.
  bool step(std::string& piece);
  void stop();
  GenerateResult result() const;
  // Ends it where make_token() has not, keeping the text that is certain.
  void finish(FinishReason reason);

 private:
  // Inside a call: gives the session back.
  void end();

  TokenLoop loop_;
  // Held where loop_'s result changes, which calls constraints, and by those who look.
  mutable LongMutex result_mutex_{
      "the generation was in use by another thread's call when this process was forked"};
  std::atomic<bool> ended_{false}, stop_wanted_{false};
};

}  // namespace mustafar
