// Whose a session is: generations and replies own it from start to end, cancel() belongs to what
// runs, close() does not wait, and no handle that was moved or outlived is dangling.
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "mustafar/chat.h"
#include "mustafar/error.h"
#include "mustafar/session.h"
#include "support/sampling.h"
#include "support/tiny_model.h"

namespace mustafar {
namespace {

class SessionOwnershipTest : public ::testing::Test {
 protected:
  void SetUp() override {
    testing::write_tiny_model(folder_.path());
    ModelOptions options;
    options.threads = 1;
    model_.emplace(Model::load(folder_.path(), options));
  }

  testing::TemporaryFolder folder_;
  std::optional<Model> model_;
};

template <typename Call>
std::string refusal_of(Call&& call) {
  try {
    call();
  } catch (const StateError& error) {
    return error.what();
  }
  return "";
}

TEST_F(SessionOwnershipTest, ACallBetweenTwoStepsIsRefusedAndDisturbsNothing) {
  Session session(*model_), alone(*model_);
  const GenerateResult expected = alone.generate("Hello", testing::greedy(12));
  Generation generation = session.start("Hello", testing::greedy(12));
  const int64_t prompt = session.position();
  std::string piece, text;
  const std::vector<std::function<void()>> calls = {
      [&] { session.decode(5); },
      [&] { session.prefill(std::vector<int32_t>{5}); },
      [&] { session.generate("x", testing::greedy(1)); },
      [&] { session.start("x", testing::greedy(1)); },
      [&] { session.rewind(0); },
      [&] { session.reset(); },
      [&] { session.logits(); },
      [&] { session.fork(); },
      [&] { session.score(std::vector<int32_t>{1, 2}); },
      [&] { session.save(folder_.path() / "state"); },
      [&] { Session::decode_batch(std::vector<Session*>{&session}, std::vector<int32_t>{1}); },
      [&] { Chat(session).send("x", testing::greedy(1)); },
  };
  for (int64_t made = 0; generation.step(piece); made++) {
    text += piece;
    if (made + 1 == 12) break;  // the last token: the session is free again
    for (const auto& call : calls) {
      EXPECT_NE(refusal_of(call).find("generation that has not ended"), std::string::npos);
    }
    EXPECT_EQ(session.position(), prompt + made + 1);
    EXPECT_EQ(session.memory().dense_tokens, session.position());
    EXPECT_EQ(session.tokens().size(), static_cast<size_t>(session.position()));
  }
  EXPECT_EQ(text, expected.text);
  EXPECT_EQ(generation.result().token_ids, expected.token_ids);
  session.decode(5);
  EXPECT_FALSE(generation.step(piece));
}

TEST_F(SessionOwnershipTest, AGenerationThatIsDroppedStoppedOrThrowsGivesTheSessionBack) {
  Session session(*model_);
  std::string piece;
  {
    Generation dropped = session.start("Hello", testing::greedy(9));
    dropped.step(piece);
  }
  session.decode(5);
  Generation stopped = session.start("Hello", testing::greedy(9));
  stopped.step(piece);
  stopped.stop();
  EXPECT_EQ(stopped.result().finish_reason, FinishReason::kCancelled);
  EXPECT_EQ(stopped.result().token_ids.size(), 1u);
  session.decode(5);

  Generation first = session.start("Hello", testing::greedy(9));
  first.step(piece);
  first.stop();
  first = session.start("more", testing::greedy(9));  // assigned over: the old one is gone
  first.step(piece);
  const int64_t position = session.position();
  session.set_interrupt_check([] { throw std::runtime_error("enough"); });
  EXPECT_THROW(first.step(piece), std::runtime_error);
  session.set_interrupt_check({});
  EXPECT_EQ(session.position(), position);
  EXPECT_EQ(first.result().finish_reason, FinishReason::kCancelled);
  EXPECT_FALSE(first.step(piece));
  session.decode(5);
}

TEST_F(SessionOwnershipTest, NoTokensAskedForIsNoGeneration) {
  Session session(*model_);
  Generation generation = session.start("Hello", testing::greedy(0));
  session.decode(5);
  std::string piece;
  EXPECT_FALSE(generation.step(piece));
}

TEST_F(SessionOwnershipTest, CallbacksCannotCallTheSession) {
  Session session(*model_), alone(*model_);
  int calls = 0;
  const auto result = session.generate("Hello", testing::greedy(6), [&](std::string_view) {
    calls++;
    EXPECT_NE(refusal_of([&] { session.decode(5); }), "");
    EXPECT_NE(refusal_of([&] { session.close(); }), "");
    EXPECT_EQ(session.memory().dense_tokens, session.position());
    return true;
  });
  EXPECT_GT(calls, 0);
  EXPECT_EQ(result.token_ids, alone.generate("Hello", testing::greedy(6)).token_ids);
}

TEST_F(SessionOwnershipTest, CancelBelongsToTheCallThatRuns) {
  Session session(*model_);
  const std::vector<int32_t> ids = {1, 2, 3, 4, 5};
  const std::vector<std::function<void()>> calls = {
      [&] { session.prefill(ids); },
      [&] { session.decode(5); },
      [&] { session.generate("Hello", testing::greedy(3)); },
      [&] { session.score(ids); },
      [&] { session.rewind(2); },
      [&] { session.logits(); },
  };
  for (const auto& call : calls) {
    session.cancel();  // nothing runs
    EXPECT_NO_THROW(call());
  }
  session.prefill(ids);
  const std::vector<int32_t> before = session.tokens();
  session.set_interrupt_check([&] { session.cancel(); });  // of the call that runs, near its end
  session.decode(5);
  session.set_interrupt_check({});
  EXPECT_NO_THROW(session.decode(5));
  session.rewind(static_cast<int64_t>(before.size()));

  // generate is one call: the session is as before it. A generation's steps are calls of their own.
  int pieces = 0;
  EXPECT_THROW(session.generate("Hello", testing::greedy(9),
                                [&](std::string_view) {
                                  if (++pieces == 2) session.cancel();
                                  return true;
                                }),
               Cancelled);
  EXPECT_EQ(session.tokens(), before);
  Generation generation = session.start("Hello", testing::greedy(9));
  std::string piece;
  generation.step(piece);
  const std::vector<int32_t> held = session.tokens();
  session.cancel();  // between two steps: of the generation
  EXPECT_THROW(generation.step(piece), Cancelled);
  EXPECT_EQ(session.tokens(), held);
  EXPECT_EQ(generation.result().finish_reason, FinishReason::kCancelled);
  EXPECT_NO_THROW(session.decode(5));

  Generation other = session.start("Hello", testing::greedy(9));
  session.cancel();
  other.stop();  // takes the cancel with it
  EXPECT_NO_THROW(session.decode(5));
}

TEST_F(SessionOwnershipTest, ACancelledReplyKeepsWhatWasSaid) {
  Session session(*model_);
  Chat chat(session);
  chat.cancel();
  EXPECT_NO_THROW(chat.send("One", testing::greedy(3)));
  std::string piece, said;
  ChatReply reply = chat.start("Two", testing::greedy(9));
  reply.step(piece);
  chat.cancel();
  EXPECT_THROW(reply.step(piece), Cancelled);
  EXPECT_EQ(chat.messages().size(), 4u);
  EXPECT_EQ(chat.messages()[3].content(), reply.result().text);
  EXPECT_NO_THROW(chat.send("Three", testing::greedy(3)));
  // Before a reply has begun: the messages are as they were.
  const std::string before = chat.messages_json();
  session.set_prefill_progress([&](int64_t, int64_t) { chat.cancel(); });
  EXPECT_THROW(chat.send("Four", testing::greedy(3)), Cancelled);
  session.set_prefill_progress({});
  EXPECT_EQ(chat.messages_json(), before);
}

TEST_F(SessionOwnershipTest, AReplyOwnsItsChat) {
  Session session(*model_);
  Chat chat(session, {.system = "Be brief"});
  std::string piece;
  ChatReply reply = chat.start("One", testing::greedy(9));
  reply.step(piece);
  const std::string before = chat.messages_json();
  EXPECT_NE(refusal_of([&] { chat.start("Two", testing::greedy(1)); }), "");
  EXPECT_NE(refusal_of([&] { chat.undo(); }), "");
  EXPECT_NE(refusal_of([&] { chat.clear(); }), "");
  EXPECT_NE(refusal_of([&] { chat.add(ChatMessage("user", "x")); }), "");
  EXPECT_NE(refusal_of([&] { chat.set_system("x"); }), "");
  EXPECT_NE(refusal_of([&] { chat.save(folder_.path() / "chat"); }), "");
  EXPECT_NE(refusal_of([&] { session.decode(5); }), "");
  EXPECT_EQ(chat.messages_json(), before);
  reply.stop();
  EXPECT_EQ(chat.messages().size(), 3u);
  EXPECT_EQ(chat.undo(), "One");
}

TEST_F(SessionOwnershipTest, CloseRefusesACallAndEndsAGeneration) {
  Session session(*model_);
  std::string why;
  session.prefill(std::vector<int32_t>{1, 2, 3},
                  [&](int64_t, int64_t) { why = refusal_of([&] { session.close(); }); });
  EXPECT_NE(why.find("in use by another call"), std::string::npos);
  EXPECT_EQ(session.position(), 3);
  Generation generation = session.start("Hello", testing::greedy(9));
  std::string piece;
  generation.step(piece);
  session.close();
  EXPECT_EQ(model_->memory().kv_bytes, 0);
  EXPECT_EQ(refusal_of([&] { generation.step(piece); }), "the session is closed");
  EXPECT_EQ(generation.result().token_ids.size(), 1u);
  generation.stop();
  EXPECT_FALSE(generation.step(piece));
  session.close();  // again: nothing
  EXPECT_EQ(refusal_of([&] { session.memory(); }), "the session is closed");
  EXPECT_EQ(refusal_of([&] { session.decode(1); }), "the session is closed");

  Session other(*model_);
  Chat chat(other);
  ChatReply reply = chat.start("One", testing::greedy(9));
  reply.step(piece);
  const std::string said = reply.result().text;
  other.close();
  reply.stop();
  EXPECT_EQ(chat.messages().size(), 2u);
  EXPECT_EQ(chat.messages()[1].content().substr(0, said.size()), said);
}

TEST_F(SessionOwnershipTest, ChatsFollowASessionThatIsMoved) {
  struct Conversation {
    Session session;
    Chat chat;
    explicit Conversation(const Model& model) : session(model), chat(session) {}
  };
  std::vector<Conversation> all;
  for (int i = 0; i < 5; i++) {
    all.emplace_back(*model_);
    for (Conversation& each : all) each.chat.send("One", testing::greedy(2));
  }
  for (Conversation& each : all) {
    EXPECT_EQ(each.chat.session().position(), each.session.position());
    each.session.decode(5);
    EXPECT_EQ(each.chat.session().tokens(), each.session.tokens());
  }
  EXPECT_EQ(all.front().chat.messages().size(), 10u);

  // Those that outlive what they were made of keep it.
  std::optional<Session> session(*model_);
  std::optional<Chat> chat(*session);
  ChatReply reply = chat->start("One", testing::greedy(4));
  Generation generation = Session(*model_).start("Hello", testing::greedy(4));
  session.reset();
  Chat moved = std::move(*chat);
  chat.reset();
  std::string piece;
  while (reply.step(piece)) {
  }
  while (generation.step(piece)) {
  }
  EXPECT_EQ(moved.messages().size(), 2u);
  EXPECT_EQ(generation.result().token_ids.size(), 4u);
}

TEST_F(SessionOwnershipTest, WhatWasMovedFromSaysSo) {
  Session session(*model_), other(*model_);
  const std::vector<int32_t> ids = {1, 2};
  Generation generation = other.start("Hello", testing::greedy(2));
  const Generation generation_now = std::move(generation);
  Chat chat(session);
  ChatReply reply = chat.start("One", testing::greedy(2));
  const ChatReply reply_now = std::move(reply);
  const Chat chat_now = std::move(chat);
  const Session session_now = std::move(session);
  Model model = *model_;
  const Model model_now = std::move(model);
  Tokenizer tokenizer = model_->tokenizer();
  Tokenizer::Stream stream(tokenizer);
  const Tokenizer::Stream stream_now = std::move(stream);
  const Tokenizer tokenizer_now = std::move(tokenizer);
  ChatTemplate chat_template = tokenizer_now.chat_template();
  const ChatTemplate template_now = std::move(chat_template);
  Session target(*model_);
  std::string piece;
  const std::vector<std::function<void()>> calls = {
      [&] { session.prefill(ids); },
      [&] { session.decode(1); },
      [&] { Session::decode_batch(std::vector<Session*>{&session}, std::vector<int32_t>{1}); },
      [&] { session.logits(); },
      [&] { session.generate("x"); },
      [&] { session.start("x"); },
      [&] { session.score(ids); },
      [&] { session.score_logits(ids, [](int64_t, std::span<const float>) {}); },
      [&] { session.position(); },
      [&] { session.tokens(); },
      [&] { session.max_tokens(); },
      [&] { session.model(); },
      [&] { session.kv_config(); },
      [&] { session.memory(); },
      [&] { session.rewind(0); },
      [&] { session.fork(); },
      [&] { session.reset(); },
      [&] { session.close(); },
      [&] { session.save("x"); },
      [&] { session.cancel(); },
      [&] { session.set_interrupt_check({}); },
      [&] { session.set_prefill_progress({}); },
      [&] { session.impl(); },
      [&] { Chat made(session); },
      [&] { generation.step(piece); },
      [&] { generation.stop(); },
      [&] { generation.result(); },
      [&] { chat.send("x"); },
      [&] { chat.start("x"); },
      [&] { chat.reply(); },
      [&] { chat.continue_last(); },
      [&] { chat.regenerate(); },
      [&] { chat.fork(target); },
      [&] { chat_now.fork(session); },
      [&] { chat.cancel(); },
      [&] { chat.undo(); },
      [&] { chat.clear(); },
      [&] { chat.add(ChatMessage("user", "x")); },
      [&] { chat.set_messages({}); },
      [&] { chat.set_system("x"); },
      [&] { chat.messages(); },
      [&] { chat.messages_json(); },
      [&] { chat.set_messages_json("[]"); },
      [&] { chat.save("x"); },
      [&] { chat.load("x"); },
      [&] { chat.prompt_tokens(); },
      [&] { chat.dropped_turns(); },
      [&] { chat.end_tokens(); },
      [&] { chat.chat_template(); },
      [&] { chat.session(); },
      [&] { reply.step(piece); },
      [&] { reply.stop(); },
      [&] { reply.result(); },
      [&] { reply.cached_tokens(); },
      [&] { model.config(); },
      [&] { model.default_sampling(); },
      [&] { model.has_tokenizer(); },
      [&] { model.tokenizer(); },
      [&] { model.folder(); },
      [&] { model.device(); },
      [&] { model.dtype(); },
      [&] { model.weights(); },
      [&] { model.device_description(); },
      [&] { model.fingerprint(); },
      [&] { model.memory(); },
      [&] { model.generate(std::vector<Prompt>{"x"}); },
      [&] { Session made(model); },
      [&] { Session::load(model, "x"); },
      [&] { tokenizer.encode("x"); },
      [&] { tokenizer.encode_chat("x"); },
      [&] { tokenizer.apply_chat_template("[]"); },
      [&] { tokenizer.chat_template(); },
      [&] { tokenizer.chat_template("chatml"); },
      [&] { tokenizer.decode(ids); },
      [&] { tokenizer.vocab_size(); },
      [&] { tokenizer.token_to_id("x"); },
      [&] { tokenizer.id_to_token(1); },
      [&] { tokenizer.is_special(1); },
      [&] { tokenizer.bos_id(); },
      [&] { tokenizer.eos_ids(); },
      [&] { tokenizer.special_prefix(); },
      [&] { Tokenizer::Stream made(tokenizer); },
      [&] { stream.push(1); },
      [&] { stream.flush(); },
      [&] { stream.settle(); },
      [&] { chat_template.render("[]"); },
      [&] { chat_template.render_marked("[]"); },
      [&] { chat_template.source(); },
      [&] { chat_template.bos_token(); },
      [&] { chat_template.eos_token(); },
      [&] { chat_template.impl(); },
  };
  for (size_t i = 0; i < calls.size(); i++) {
    EXPECT_THROW(calls[i](), StateError) << "call " << i;
  }
  model.close();  // already closed: nothing
  EXPECT_EQ(session_now.position(), reply_now.result().stats.prompt_tokens);
}

// One thread generates, others call, cancel, look and close beside it, all the time.
TEST_F(SessionOwnershipTest, ThreadsBesideAGeneration) {
  Session session(*model_), alone(*model_);
  const GenerateResult expected = alone.generate("Hello", testing::greedy(40));
  const std::vector<int32_t> all = alone.tokens();
  std::atomic<bool> done{false};
  std::atomic<int> refused{0}, looked{0};
  std::vector<std::thread> threads;
  Generation generation = session.start("Hello", testing::greedy(40));
  for (int i = 0; i < 2; i++) {
    threads.emplace_back([&] {
      while (!done) refused += !refusal_of([&] { session.decode(5); }).empty();
    });
  }
  threads.emplace_back([&] {
    while (!done) {
      const GenerateResult so_far = generation.result();
      EXPECT_TRUE(
          std::equal(so_far.token_ids.begin(), so_far.token_ids.end(), expected.token_ids.begin()));
      const std::vector<int32_t> seen = session.tokens();
      EXPECT_TRUE(std::equal(seen.begin(), seen.end(), all.begin()));
      looked++;
    }
  });
  std::string piece;
  int64_t made = 0;
  while (made < 39 && generation.step(piece)) made++;
  while (refused == 0 || looked == 0) std::this_thread::yield();
  done = true;
  for (std::thread& thread : threads) thread.join();
  generation.step(piece);
  EXPECT_EQ(generation.result().token_ids, expected.token_ids);
  EXPECT_EQ(session.tokens(), all);
}

TEST_F(SessionOwnershipTest, ThreadsThatCancelAndStopEndOnlyWhatRuns) {
  Session session(*model_);
  std::atomic<bool> done{false};
  std::atomic<int64_t> cancels{0};
  std::thread canceller([&] {
    while (!done) {
      session.cancel();
      cancels++;
      std::this_thread::yield();
    }
  });
  // In every third call one is sure to come, in the others it may.
  const auto await_cancel = [&](std::string_view) {
    const int64_t seen = cancels;
    while (cancels < seen + 2) std::this_thread::yield();
    return true;
  };
  int ended = 0;
  for (int i = 0; i < 30; i++) {
    const int64_t before = session.position();
    try {
      session.generate("Hi", testing::greedy(3),
                       i % 3 == 0 ? Session::PieceCallback(await_cancel) : nullptr);
      session.rewind(0);
    } catch (const Cancelled&) {
      ended++;
    }
    if (session.position() != 0) {
      EXPECT_EQ(session.position(), before);
    }
  }
  done = true;
  canceller.join();
  EXPECT_NO_THROW(session.generate("Hi", testing::greedy(3)));
  EXPECT_GE(ended, 10);

  for (int i = 0; i < 20; i++) {
    Generation generation = session.start("", testing::greedy(30));
    std::atomic<bool> begun{false};
    std::thread stopper([&] {
      while (!begun) std::this_thread::yield();
      generation.stop();
    });
    std::string piece;
    while (generation.step(piece)) begun = true;
    stopper.join();
    session.decode(5);  // it is free again
    session.rewind(1);
  }
}

}  // namespace
}  // namespace mustafar
