// `mustafar chat`: a conversation in the terminal.
#include "mustafar/chat.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>

#include "cli/chat/commands.h"
#include "cli/chat/display.h"
#include "cli/chat/line_editor.h"
#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "mustafar/error.h"

namespace mustafar::cli {
namespace {

struct Options {
  ModelFlags model;
  CacheFlags cache;
  SamplingFlags sampling;
  int32_t context = 0;  // tokens; 0: the model's
  std::string chat_template, tools_file;
  std::optional<std::string> system, prompt;
  bool context_shift = false;
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
        style_(editor_.is_terminal()) {
    params_.validate(model_.config().vocab_size);
    params_ = params_.with_defaults(model_.config().sampling);
  }

  int run() {
    if (editor_.is_terminal() && !options_.quiet) {
      note(model_.folder().filename().string() + " | context " +
           std::to_string(session_.max_tokens()) + " tokens | " +
           (session_.kv_config().coded()
                ? sparsity_text(session_.kv_config())
                : "sparsity " + format_number(session_.kv_config().sparsity, 2)) +
           " | /help lists the commands");
    }
    if (options_.prompt) take(*options_.prompt);
    std::string message;
    while (!done_) {
      switch (read_message(&message)) {
        case LineEditor::Outcome::kEnd:
          return kExitOk;
        case LineEditor::Outcome::kInterrupted:
          if (leave_on_interrupt_ || !editor_.is_terminal()) return kExitInterrupt;
          clear_interrupt();
          leave_on_interrupt_ = true;
          note("Ctrl-C again leaves; so does /exit");
          break;
        case LineEditor::Outcome::kLine:
          leave_on_interrupt_ = false;
          take(message);
      }
    }
    return kExitOk;
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

  // Something about the conversation, rather than of it.
  void note(const std::string& text) const {
    std::FILE* out = editor_.is_terminal() ? stdout : stderr;
    std::fprintf(out, "%s%s%s\n", style_.dim, text.c_str(), style_.off);
    std::fflush(out);
  }

  // A line, or several: after a trailing backslash, from one paste, or in multi-line mode.
  LineEditor::Outcome read_message(std::string* message) {
    std::string line;
    LineEditor::Outcome outcome = editor_.read(style_.prompt("> "), &line);
    if (outcome != LineEditor::Outcome::kLine) return outcome;
    *message = line;
    const bool command = line.starts_with('/');
    while (!command) {
      if (multiline_) {
        if (line == ".") {
          message->erase(message->size() < 2 ? 0 : message->size() - 2);
          break;
        }
      } else if (!message->empty() && message->back() == '\\') {
        message->pop_back();
      } else if (!editor_.has_pending()) {
        break;
      }
      outcome = editor_.read(style_.prompt(". "), &line);
      if (outcome == LineEditor::Outcome::kInterrupted) return outcome;
      if (outcome == LineEditor::Outcome::kEnd) break;
      *message += "\n" + line;
    }
    editor_.remember(*message);
    return LineEditor::Outcome::kLine;
  }

  // Runs a message or a command; what goes wrong is said, and the conversation goes on.
  void take(const std::string& message) {
    try {
      if (message.starts_with('/')) {
        run_command(message);
      } else if (message.find_first_not_of(" \t\n") != std::string::npos) {
        send(message);
      }
    } catch (const Cancelled&) {
      clear_interrupt();
      note("interrupted: the message was not sent; Ctrl-C again leaves");
      leave_on_interrupt_ = true;
    } catch (const ContextOverflow& error) {
      note(std::string(error.what()) + ". " + overflow_advice());
    } catch (const OutOfMemory& error) {
      note(error.what());
    } catch (const std::bad_alloc&) {
      note("out of memory; /clear, or a shorter context (-c), helps");
    } catch (const std::exception& error) {
      if (!editor_.is_terminal() && !message.starts_with('/')) throw;
      note(error.what());
    }
  }

  std::string context_advice() const {
    const int64_t most = model_.config().max_position_embeddings;
    std::string advice = "/undo takes the last turn back, /clear starts over";
    if (!options_.context_shift) advice += ", --context-shift drops the oldest turns by itself";
    if (session_.max_tokens() < most) {
      advice += ", -c sets a larger context (this model's is " + std::to_string(most) + ")";
    }
    return advice + ".";
  }

  // As context_advice, unless the last message alone is too long: then only less text helps.
  std::string overflow_advice() const {
    const auto tokens =
        static_cast<int64_t>(model_.tokenizer().encode(last_sent_, /*add_special=*/false).size());
    if (tokens < session_.max_tokens()) return context_advice();
    const int64_t most = model_.config().max_position_embeddings;
    std::string advice =
        "The message alone is " + std::to_string(tokens) + " tokens: send a part of it";
    if (session_.max_tokens() < most) {
      advice += ", or set a larger context with -c (this model's is " + std::to_string(most) + ")";
    }
    return advice + "; the conversation is as it was.";
  }

  void send(const std::string& text) {
    last_sent_ = text;
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
      if (std::fwrite(piece.data(), 1, piece.size(), stdout) != piece.size() ||
          std::fflush(stdout) != 0) {
        throw Error("could not write the output");
      }
    }
    const bool stopped = interrupted();
    reply.stop();
    std::fputs("\n", stdout);
    std::fflush(stdout);
    if (stopped) {
      clear_interrupt();
      leave_on_interrupt_ = true;
      note("stopped; Ctrl-C again leaves");
    }
    const GenerateResult& result = reply.result();
    total_.prompt_tokens += result.stats.prompt_tokens;
    total_.generated_tokens += result.stats.generated_tokens;
    total_.prefill_seconds += result.stats.prefill_seconds;
    total_.decode_seconds += result.stats.decode_seconds;
    if (!options_.quiet) note(turn_line(result.stats, reply.cached_tokens()));
    if (result.finish_reason == FinishReason::kContext) {
      note("the context of " + std::to_string(session_.max_tokens()) + " tokens is full. " +
           context_advice());
    }
  }

  std::string context_text() const {
    return "context " + std::to_string(session_.position()) + "/" +
           std::to_string(session_.max_tokens());
  }

  std::string turn_line(const GenerateStats& stats, int64_t cached_tokens) const {
    std::string line = "prompt " + speed_text(stats.prompt_tokens, stats.prefill_seconds);
    if (cached_tokens > 0) line += " (" + std::to_string(cached_tokens) + " cached)";
    return line + " | reply " + speed_text(stats.generated_tokens, stats.decode_seconds) + " | " +
           context_text() + " | " + memory_text(session_.memory());
  }

  void run_command(const std::string& line) {
    const size_t space = line.find_first_of(" \t\n");
    const std::string name = line.substr(0, space);
    std::string argument = space == std::string::npos ? "" : line.substr(space + 1);
    argument.erase(0, argument.find_first_not_of(" \t"));
    argument.erase(argument.find_last_not_of(" \t\n") + 1);
    if (name == "/exit" || name == "/quit") {
      done_ = true;
    } else if (name == "/help") {
      std::fputs(chat_help().c_str(), stdout);
    } else if (name == "/clear") {
      chat_.clear();
      note("cleared");
    } else if (name == "/regen") {
      reply([&] { return chat_.regenerate(params_); });
    } else if (name == "/undo") {
      const auto text = chat_.undo();
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
      show_stats();
    } else if (name == "/sparsity") {
      set_sparsity(argument);
    } else if (name == "/multiline") {
      multiline_ = !multiline_;
      note(multiline_ ? "multi-line: a line with a single . ends a message" : "single lines");
    } else {
      note("no command " + name + "; /help lists them");
    }
    std::fflush(stdout);
  }

  static const std::string& needed(const std::string& argument, const char* usage) {
    if (argument.empty()) throw std::invalid_argument(std::string("usage: ") + usage);
    return argument;
  }

  void read_file(const std::string& argument) {
    const auto [file, question] = split_file(needed(argument, "/read FILE [TEXT]"));
    std::string text = read_text(file);
    if (!question.empty()) text += "\n\n" + question;
    note("read " + file + ", " + bytes_text(static_cast<int64_t>(text.size())));
    send(text);
  }

  // The conversation moves to a cache of another sparsity, computed here and now; until that is
  // done, and where it fails, the cache stays as it was.
  void set_sparsity(const std::string& argument) {
    if (argument.empty()) return note(sparsity_text(session_.kv_config()));
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
      return note("interrupted: the cache stays as it was, " + sparsity_text(session_.kv_config()) +
                  "; Ctrl-C again leaves");
    } catch (const std::exception& error) {
      return note(std::string(error.what()) + "; the cache stays as it was, " +
                  sparsity_text(session_.kv_config()));
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    session_ = std::move(changed);
    note(sparsity_text(session_.kv_config()) +
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

  void show_stats() const {
    const MemoryUsage m = session_.memory();
    note("messages " + std::to_string(chat_.messages().size()) + " | " + context_text() +
         " | compressed " + std::to_string(m.compressed_tokens) + " tokens, dense " +
         std::to_string(m.dense_tokens));
    note(memory_text(m) + " (K " + format_number(m.k_sparsity, 2) + " V " +
         format_number(m.v_sparsity, 2) + " where compressed)");
    note("masks " + bytes_text(m.masks) + " | values " + bytes_text(m.values) + " | scales " +
         bytes_text(m.scales) + " | dense tail " + bytes_text(m.tail) + " | allocated " +
         bytes_text(m.allocated));
    note("in all: prompt " + speed_text(total_.prompt_tokens, total_.prefill_seconds) +
         " | reply " + speed_text(total_.generated_tokens, total_.decode_seconds));
  }

  const Options& options_;
  SamplingParams params_;
  Model model_;
  Session session_;
  Chat chat_;
  LineEditor editor_;
  Style style_;
  GenerateStats total_;
  std::string last_sent_;
  bool multiline_ = false;
  bool done_ = false;
  bool leave_on_interrupt_ = false;  // the last Ctrl-C stopped something
};

}  // namespace

void add_chat(CLI::App& app, Run& run) {
  const auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("chat", "Talk with a model");
  options->model.add_to(*command);
  command->add_option("-p,--prompt", options->prompt, "First message");
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
  command->add_flag("-q,--quiet", options->quiet, "No line of numbers after a reply");
  command->callback([options, &run] {
    run = [options] {
      options->cache.validate();
      const InterruptGuard guard;
      return ChatProgram(*options).run();
    };
  });
}

}  // namespace mustafar::cli
