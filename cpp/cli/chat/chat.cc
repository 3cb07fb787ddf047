// `mustafar chat`: a conversation in the terminal.
#include "mustafar/chat.h"

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>

#include "cli/chat/commands.h"
#include "cli/chat/display.h"
#include "cli/chat/line_editor.h"
#include "cli/chat/message_reader.h"
#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/options.h"
#include "cli/report.h"
#include "cli/terminal.h"
#include "cli/text_file.h"
#include "mustafar/error.h"

namespace mustafar::cli {
namespace {

struct Options {
  ModelFlags model;
  CacheFlags cache;
  SamplingFlags sampling;
  int32_t context = 0;  // tokens; 0: the model's
  std::string chat_template, tools_file;
  std::optional<std::string> system, prompt, file;
  bool context_shift = false;
  bool commands = false;
  bool json = false;
  bool quiet = false;
};

std::string history_path() {
  if (const char* path = std::getenv("MUSTAFAR_HISTORY")) return path;
  const char* home = std::getenv("HOME");
  return home ? std::string(home) + "/.mustafar_history" : "";
}

class ChatProgram {
 public:
  explicit ChatProgram(const Options& options)
      : options_(options),
        params_(options.sampling.resolve()),
        model_(options.model.load()),
        session_(model_, options.cache.resolve(model_), max_tokens()),
        chat_(session_, chat_options()),
        editor_("mustafar", history_path(), complete_chat_line),
        style_(editor_.is_terminal()),
        reader_(editor_, style_, options.commands || editor_.is_terminal()) {
    params_.validate(model_.config().vocab_size);
    params_ = params_.with_defaults(model_.config().sampling);
  }

  int run() {
    if (editor_.is_terminal() && !options_.quiet) {
      note(model_.folder().filename().string() + " | context " +
           std::to_string(session_.max_tokens()) + " tokens | " +
           cache_text(model_, session_.kv_config()) + " | /help lists the commands");
    }
    if (!editor_.history_problem().empty()) {
      note("no history is kept: " + editor_.history_problem());
    }
    if (options_.prompt) take(*options_.prompt, /*is_command=*/false);
    if (options_.file) take_file(*options_.file);
    // A file given, or JSON wanted, is one question: standard input is not looked at.
    const bool asked = options_.prompt || options_.file;
    if (asked && (options_.json || (options_.file && !editor_.is_terminal()))) return exit_code();
    std::string message;
    bool is_command = false;
    while (!done_) {
      switch (reader_.read(&message, &is_command)) {
        case LineEditor::Outcome::kEnd:
          return exit_code();
        case LineEditor::Outcome::kInterrupted:
          if (leave_on_interrupt_ || !editor_.is_terminal()) return kExitInterrupt;
          clear_interrupt();
          leave_on_interrupt_ = true;
          note("Ctrl-C again leaves; so does /exit");
          break;
        case LineEditor::Outcome::kLine:
          leave_on_interrupt_ = false;
          take(message, is_command);
      }
    }
    return exit_code();
  }

 private:
  std::optional<int32_t> max_tokens() const {
    if (options_.context < 0) {
      throw std::invalid_argument("-c must be 0 (the model's context) or a count of tokens, not " +
                                  std::to_string(options_.context));
    }
    return options_.context > 0 ? std::optional<int32_t>(options_.context) : std::nullopt;
  }

  ChatOptions chat_options() const {
    ChatOptions chat;
    chat.system = options_.system;
    chat.context_shift = options_.context_shift;
    if (!options_.tools_file.empty()) chat.tools = read_text(options_.tools_file);
    if (!options_.chat_template.empty()) {
      chat.chat_template = ChatTemplate::from_argument(options_.chat_template, model_.folder());
    }
    return chat;
  }

  // At a terminal all is said there; elsewhere who called looks at this.
  int exit_code() const {
    if (editor_.is_terminal()) return kExitOk;
    if (leave_on_interrupt_) return kExitInterrupt;
    if (failed_) return kExitError;
    if (replies_ > 0 || commands_ > 0) return kExitOk;
    note("mustafar: there was no message to answer");
    return kExitError;
  }

  // Something about the conversation, rather than of it.
  void note(const std::string& text) const {
    std::FILE* out = editor_.is_terminal() ? stdout : stderr;
    std::fprintf(out, "%s%s%s\n", style_.dim, text.c_str(), style_.off);
    std::fflush(out);
  }

  // Runs a message or a command; what goes wrong is said, and the conversation goes on.
  void take(const std::string& message, bool is_command) {
    attempt([&] {
      if (is_command) {
        commands_++;
        run_command(message);
      } else if (message.find_first_not_of(" \t\n") != std::string::npos) {
        send(message);
      }
    });
  }

  // -f: a message, or a conversation as JSON, of which the last message is answered or, where it is
  // the assistant's, continued.
  void take_file(const std::string& file) {
    TextFile read = read_text_file(file);
    if (read.text.ends_with('\n')) read.text.pop_back();  // the one that editors add
    if (!is_conversation(read.text)) return take(read.text, /*is_command=*/false);
    attempt([&] {
      chat_.set_messages_json(read.text);
      const bool begun = !chat_.messages().empty() && chat_.messages().back().role() == "assistant";
      reply([&] { return begun ? chat_.continue_last(params_) : chat_.reply(params_); });
    });
  }

  template <typename Work>
  void attempt(const Work& work) {
    try {
      work();
    } catch (const Cancelled&) {
      clear_interrupt();
      failed_ = true;
      note("interrupted: the message was not sent; Ctrl-C again leaves");
      leave_on_interrupt_ = true;
    } catch (const ContextOverflow& error) {
      complain(std::string(error.what()) + ". " +
               overflow_advice(session_, last_sent_, options_.context_shift));
    } catch (const OutOfMemory& error) {
      complain(error.what());
    } catch (const std::bad_alloc&) {
      complain("out of memory; /clear, or a shorter context (-c), helps");
    } catch (const std::exception& error) {
      complain(error.what());
    }
  }

  void complain(const std::string& what) {
    failed_ = true;
    note(with_option_names(what));
  }

  void send(const std::string& text) {
    last_sent_ = text;
    taken_back_.reset();
    reply([&] { return chat_.start(text, params_); });
  }

  // Starts the work on the prompt, with a bar; Ctrl-C throws Cancelled.
  template <typename Start>
  ChatReply begin(const Start& start) {
    Progress bar("reading");
    session_.set_interrupt_check(throw_if_interrupted);
    session_.set_prefill_progress([&bar](int64_t done, int64_t total) { bar.update(done, total); });
    const auto done = [this](void*) {  // from here on Ctrl-C ends the reply between two tokens
      session_.set_interrupt_check({});
      session_.set_prefill_progress({});
    };
    const std::unique_ptr<void, decltype(done)> restore(this, done);
    return start();
  }

  template <typename Start>
  void reply(const Start& start) {
    const int64_t dropped = chat_.dropped_turns();
    ChatReply reply = begin(start);
    if (chat_.dropped_turns() > dropped) {
      note("the context is full: the oldest " + std::to_string(chat_.dropped_turns() - dropped) +
           " turn(s) are dropped");
    }
    std::string piece;
    while (!interrupted() && reply.step(piece)) {
      if (options_.json) continue;
      if (std::fwrite(piece.data(), 1, piece.size(), stdout) != piece.size() ||
          std::fflush(stdout) != 0) {
        throw Error("could not write the output");
      }
    }
    const bool stopped = interrupted();
    reply.stop();
    replies_++;
    const GenerateResult& result = reply.result();
    std::fputs(options_.json ? (dump(reply_json(chat_, reply)) + "\n").c_str() : "\n", stdout);
    std::fflush(stdout);
    if (stopped) {
      clear_interrupt();
      leave_on_interrupt_ = true;
      note("stopped; Ctrl-C again leaves");
    }
    total_.prompt_tokens += result.stats.prompt_tokens;
    total_.generated_tokens += result.stats.generated_tokens;
    total_.prefill_seconds += result.stats.prefill_seconds;
    total_.decode_seconds += result.stats.decode_seconds;
    if (options_.json) return;
    if (!options_.quiet) note(turn_text(session_, result.stats, reply.cached_tokens()));
    if (result.finish_reason == FinishReason::kContext) {
      note("the reply was cut: the context of " + std::to_string(session_.max_tokens()) +
           " tokens is full. " + context_advice(session_, options_.context_shift));
    } else if (result.finish_reason == FinishReason::kLength && !options_.quiet) {
      note("the reply was cut after " + std::to_string(result.token_ids.size()) +
           " tokens (-n); /continue goes on");
    }
  }

  void run_command(const std::string& line) {
    const size_t space = line.find_first_of(" \t\n");
    const std::string name = line.substr(0, space);
    std::string argument = space == std::string::npos ? "" : line.substr(space + 1);
    argument.erase(0, argument.find_first_not_of(" \t"));
    argument.erase(argument.find_last_not_of(" \t\n") + 1);
    if (name == "/exit" || name == "/quit" || name == "/bye") {
      done_ = true;
    } else if (name == "/help") {
      std::fputs(chat_help().c_str(), stdout);
    } else if (name == "/clear") {
      chat_.clear();
      taken_back_.reset();
      note("cleared");
    } else if (name == "/regen") {
      regenerate();
    } else if (name == "/continue") {
      reply([&] { return chat_.continue_last(params_); });
    } else if (name == "/undo") {
      const auto text = chat_.undo();
      if (text) taken_back_ = text;
      note(text ? "took back: " + *text : "there is nothing to take back");
    } else if (name == "/read") {
      read_file(argument);
    } else if (name == "/system") {
      chat_.set_system(argument.empty() ? std::nullopt : std::optional<std::string>(argument));
      note(std::string(argument.empty() ? "no system message" : "system message set") +
           (chat_.messages().size() > (argument.empty() ? 0 : 1)
                ? "; the conversation is computed anew with the next message"
                : ""));
    } else if (name == "/save") {
      chat_.save(expand_home(needed(argument, "/save FILE")));
      note("saved " + argument);
    } else if (name == "/load") {
      const bool cached = chat_.load(expand_home(needed(argument, "/load FILE")));
      note("loaded " + std::to_string(chat_.messages().size()) + " messages" +
           (cached ? " and their cache" : "; their cache does not fit and is computed anew"));
    } else if (name == "/set") {
      if (!argument.empty()) set_parameters(argument, &params_, model_.config().vocab_size);
      note(show_parameters(params_));
    } else if (name == "/stats") {
      note(stats_text(chat_, total_));
    } else if (name == "/sparsity") {
      set_sparsity(argument);
    } else if (name == "/multiline") {
      note(reader_.toggle_multiline() ? "multi-line: a line with a single . ends a message"
                                      : "single lines");
    } else {
      note("no command " + name + "; /help lists them");
    }
    std::fflush(stdout);
  }

  static const std::string& needed(const std::string& argument, const char* usage) {
    if (argument.empty()) throw std::invalid_argument(std::string("usage: ") + usage);
    return argument;
  }

  // The last reply again; where /undo took all of the conversation back, what it took last.
  void regenerate() {
    const bool has_reply =
        !chat_.messages().empty() && chat_.messages().back().role() == "assistant";
    if (has_reply || !taken_back_) return reply([&] { return chat_.regenerate(params_); });
    const std::string again = *taken_back_;
    note("sending again: " + again);
    send(again);
  }

  void read_file(const std::string& argument) {
    const auto [file, question] = split_file(needed(argument, "/read FILE [TEXT]"));
    TextFile read = read_text_file(file);
    if (!question.empty()) read.text += "\n\n" + question;
    note("read " + file + ", " + bytes_text(static_cast<int64_t>(read.text.size())) + " of " +
         read.kind + " text");
    send(read.text);
  }

  // The conversation moves to a cache of another sparsity, computed here and now; until that is
  // done, and where it fails, the cache stays as it was.
  void set_sparsity(const std::string& argument) {
    if (argument.empty()) return note(sparsity_text(model_, session_.kv_config()));
    KVConfig kv = session_.kv_config();
    if (kv.coded()) throw std::invalid_argument("/sparsity: a coded cache prunes nothing");
    char* end = nullptr;
    kv.sparsity = std::strtod(argument.c_str(), &end);
    if (*end != '\0') throw std::invalid_argument("/sparsity: '" + argument + "' is no number");
    kv.k_sparsity.reset();
    kv.v_sparsity.reset();
    kv.validate();
    Session changed(model_, kv, static_cast<int32_t>(session_.max_tokens()));
    const int64_t tokens = session_.position();
    const auto start = std::chrono::steady_clock::now();
    try {
      if (tokens > 0) recompute(&changed);
    } catch (const Cancelled&) {
      clear_interrupt();
      leave_on_interrupt_ = true;
      return note("interrupted: the cache stays as it was, " +
                  sparsity_text(model_, session_.kv_config()) + "; Ctrl-C again leaves");
    } catch (const std::exception& error) {
      return note(with_option_names(error.what()) + "; the cache stays as it was, " +
                  sparsity_text(model_, session_.kv_config()));
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    chat_ = chat_.fork(changed);
    session_ = std::move(changed);
    note(sparsity_text(model_, session_.kv_config()) +
         (tokens > 0 ? "; computed again: " + speed_text(tokens, seconds.count()) : ""));
  }

  // Computes the conversation so far in another session, with a bar; Ctrl-C throws Cancelled.
  void recompute(Session* session) const {
    note("computing the conversation's " + std::to_string(session_.position()) + " tokens again");
    Progress bar("reading");
    session->set_interrupt_check(throw_if_interrupted);
    session->prefill(session_.tokens(),
                     [&bar](int64_t done, int64_t total) { bar.update(done, total); });
    session->set_interrupt_check({});
  }

  const Options& options_;
  SamplingParams params_;
  Model model_;
  Session session_;
  Chat chat_;
  LineEditor editor_;
  Style style_;
  GenerateStats total_;
  MessageReader reader_;
  std::string last_sent_;
  std::optional<std::string> taken_back_;  // by /undo, since the last message
  int64_t replies_ = 0, commands_ = 0;
  bool failed_ = false;  // something that was to be done could not
  bool done_ = false;
  bool leave_on_interrupt_ = false;  // the last Ctrl-C stopped something
};

}  // namespace

void add_chat(CLI::App& app, Run& run) {
  const auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("chat", "Talk with a model");
  options->model.add_to(*command);
  CLI::Option* prompt = command->add_option("-p,--prompt", options->prompt, "First message");
  command
      ->add_option("-f,--file", options->file,
                   "File that holds the first message, or a JSON list of messages to reply to; -: "
                   "standard input. Unless at a terminal, nothing else is read")
      ->excludes(prompt);
  command->add_option("--system", options->system, "System message");
  command->add_option("--chat-template", options->chat_template,
                      "A built-in template or a Jinja file instead of the model's own");
  command->add_option("--tools", options->tools_file, "JSON file with a list of tool definitions");
  command->add_option("-c,--ctx-size", options->context, "Tokens of context; 0: the model's")
      ->capture_default_str();
  command->add_flag("--context-shift", options->context_shift,
                    "Drop the oldest turns when the context is full");
  options->sampling.add_to(*command);
  options->cache.add_to(*command);
  command->add_flag("--commands", options->commands,
                    "Lines of a pipe that begin with / are commands; otherwise every line is a "
                    "message");
  command->add_flag("--json", options->json,
                    "One JSON object for a reply instead of text; with -p or -f, or for every line "
                    "of a pipe");
  command->add_flag("-q,--quiet", options->quiet, "No line of numbers after a reply");
  command->callback([options, &run] {
    run = [options] {
      options->cache.validate();
      const bool asked = options->prompt || options->file;
      if (options->json && !asked && isatty(STDIN_FILENO) == 1) {
        throw std::invalid_argument("--json needs -p TEXT, -f FILE, or messages from a pipe");
      }
      const InterruptGuard guard;
      return ChatProgram(*options).run();
    };
  });
}

}  // namespace mustafar::cli
