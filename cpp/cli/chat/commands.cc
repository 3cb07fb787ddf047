#include "cli/chat/commands.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <optional>
#include <stdexcept>
#include <system_error>

#include "cli/terminal.h"

namespace mustafar::cli {
namespace {

namespace fs = std::filesystem;

struct Parameter {
  const char* name;
  std::function<void(SamplingParams&, double)> set;
  std::function<std::string(const SamplingParams&)> show;
  bool whole;  // integers only
};

// What is set in the chat is decided: nothing is left to the model's folder.
std::string shown(double value) {
  char text[40];
  std::snprintf(text, sizeof(text), "%.15g", value);
  return text;
}

Parameter real(const char* name, std::optional<double> SamplingParams::* field) {
  return {name, [field](SamplingParams& p, double v) { p.*field = v; },
          [field](const SamplingParams& p) { return shown((p.*field).value()); }, false};
}

Parameter whole(const char* name, std::optional<int32_t> SamplingParams::* field) {
  return {name, [field](SamplingParams& p, double v) { p.*field = static_cast<int32_t>(v); },
          [field](const SamplingParams& p) { return shown((p.*field).value()); }, true};
}

Parameter max_tokens() {
  return {"max-tokens",
          [](SamplingParams& p, double v) { p.max_new_tokens = static_cast<int32_t>(v); },
          [](const SamplingParams& p) { return std::to_string(p.max_new_tokens); }, true};
}

Parameter seed() {
  const auto set = [](SamplingParams& p, double v) {
    p.seed = v < 0 ? std::nullopt : std::optional<uint64_t>(static_cast<uint64_t>(v));
  };
  const auto show = [](const SamplingParams& p) {
    return p.seed ? std::to_string(*p.seed) : std::string("-1");
  };
  return {"seed", set, show, true};
}

const std::vector<Parameter>& parameters() {
  static const std::vector<Parameter> kParameters = {
      real("temp", &SamplingParams::temperature),
      whole("top-k", &SamplingParams::top_k),
      real("top-p", &SamplingParams::top_p),
      real("min-p", &SamplingParams::min_p),
      real("repeat-penalty", &SamplingParams::repetition_penalty),
      whole("repeat-last-n", &SamplingParams::penalty_window),
      real("presence-penalty", &SamplingParams::presence_penalty),
      real("frequency-penalty", &SamplingParams::frequency_penalty),
      max_tokens(),
      seed(),
  };
  return kParameters;
}

std::string parameter_names() {
  std::string names;
  for (const Parameter& p : parameters()) names += std::string(names.empty() ? "" : ", ") + p.name;
  return names;
}

std::vector<std::string> complete_file(const std::string& typed) {
  constexpr size_t kMostShown = 200;
  const size_t slash = typed.find_last_of('/');
  const std::string folder = slash == std::string::npos ? "" : typed.substr(0, slash + 1);
  const std::string start = slash == std::string::npos ? typed : typed.substr(slash + 1);
  std::vector<std::string> found;
  std::error_code error;
  const std::string place = folder.empty() ? "." : expand_home(folder);
  for (const auto& entry : fs::directory_iterator(place, error)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(start) || (start.empty() && name[0] == '.')) continue;
    std::error_code ignored;
    found.push_back(folder + name + (entry.is_directory(ignored) ? "/" : ""));
    if (found.size() >= kMostShown) break;
  }
  std::sort(found.begin(), found.end());
  const size_t last_word = typed.find_last_of(' ') + 1;  // names may have spaces
  for (std::string& path : found) path.erase(0, last_word);
  return found;
}

void set_parameter(const std::string& name, const std::string& text, SamplingParams* params) {
  for (const Parameter& p : parameters()) {
    if (name != p.name) continue;
    char* end = nullptr;
    const double value = std::strtod(text.c_str(), &end);
    const double most = name == "seed" ? 1e15 : 2147483647.0;
    if (text.empty() || *end != '\0' || !std::isfinite(value) ||
        (p.whole && (std::floor(value) != value || std::fabs(value) > most))) {
      throw std::invalid_argument(name + ": '" + text + "' is no " +
                                  (p.whole ? "whole number" : "number"));
    }
    p.set(*params, value);
    return;
  }
  throw std::invalid_argument("/set knows " + parameter_names() + "; not '" + name + "'");
}

}  // namespace

const std::vector<ChatCommand>& chat_commands() {
  static const std::vector<ChatCommand> kCommands = {
      {"/help", "", "this list"},
      {"/exit", "", "leave (as /bye and Ctrl-D)"},
      {"/clear", "", "forget the conversation, keep the system message"},
      {"/regen", "", "make the last reply again; all taken back: send that again"},
      {"/continue", "", "go on with the last reply, which was cut or stopped"},
      {"/undo", "", "take the last message and its reply back"},
      {"/read", "FILE [TEXT]", "send a file of UTF-8 or UTF-16 text, followed by a text"},
      {"/system", "[TEXT]", "set the system message, or remove it"},
      {"/save", "FILE", "save the conversation and its cache"},
      {"/load", "FILE", "load a saved conversation"},
      {"/set", "[NAME=VALUE...]", "show or set sampling parameters"},
      {"/stats", "", "context, memory and speed so far"},
      {"/sparsity", "[VALUE]", "show or set the pruned fraction of the cache"},
      {"/multiline", "", "switch: messages go on until a line with a single ."},
  };
  return kCommands;
}

std::string chat_help() {
  std::string out;
  for (const ChatCommand& command : chat_commands()) {
    std::string usage = std::string(command.name) + " " + command.arguments;
    usage.resize(std::max<size_t>(usage.size(), 22), ' ');
    out += "  " + usage + " " + command.help + "\n";
  }
  return out +
         "A line that ends with \\ goes on in the next, \"\"\" begins and ends several lines, and\n"
         "pasted lines are one message.\n"
         "Ctrl-C stops a reply, a second one leaves.\n";
}

std::string expand_home(const std::string& path) {
  const char* home = std::getenv("HOME");
  return home && path.starts_with("~/") ? home + path.substr(1) : path;
}

FileAndText split_file(const std::string& argument) {
  size_t end = argument.size();
  while (end != std::string::npos && end > 0) {
    const std::string file = expand_home(argument.substr(0, end));
    const size_t text = argument.find_first_not_of(' ', end);
    std::error_code error;
    if (fs::is_regular_file(file, error)) {
      return {file, text == std::string::npos ? "" : argument.substr(text)};
    }
    end = argument.find_last_of(' ', end - 1);
  }
  const size_t space = argument.find(' ');
  return {expand_home(argument.substr(0, space)),
          space == std::string::npos ? "" : argument.substr(space + 1)};
}

std::vector<std::string> complete_chat_line(const std::string& line) {
  if (!line.starts_with('/')) return {};
  std::vector<std::string> found;
  const size_t space = line.find(' ');
  if (space == std::string::npos) {
    for (const ChatCommand& command : chat_commands()) {
      if (std::string(command.name).starts_with(line)) found.push_back(command.name);
    }
    return found;
  }
  const std::string command = line.substr(0, space), typed = line.substr(space + 1);
  if (command == "/read" || command == "/save" || command == "/load") return complete_file(typed);
  if (command != "/set" || typed.find(' ') != std::string::npos) return {};
  for (const Parameter& p : parameters()) {
    if (std::string(p.name).starts_with(typed)) found.push_back(std::string(p.name) + "=");
  }
  return found;
}

void set_parameters(const std::string& assignments, SamplingParams* params, int64_t vocab_size) {
  SamplingParams changed = *params;
  size_t at = 0;
  while ((at = assignments.find_first_not_of(" \t,", at)) != std::string::npos) {
    size_t end = assignments.find_first_of("= \t,", at);
    const std::string name = assignments.substr(at, end - at);
    end = end == std::string::npos ? end : assignments.find_first_not_of("= \t", end);
    const size_t text_end = assignments.find_first_of(" \t,", end);
    set_parameter(name, end == std::string::npos ? "" : assignments.substr(end, text_end - end),
                  &changed);
    at = std::min(text_end, assignments.size());
  }
  changed.validate(vocab_size);
  *params = changed;
}

std::string show_parameters(const SamplingParams& params) {
  std::string out;
  for (const Parameter& p : parameters()) {
    out += std::string(out.empty() ? "" : "  ") + p.name + "=" + p.show(params);
  }
  return out;
}

}  // namespace mustafar::cli
