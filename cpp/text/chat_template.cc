#include "mustafar/chat_template.h"

#include <algorithm>
#include <ctime>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <utility>

#include "core/held.h"
#include "core/json_text.h"
#include "core/read_file.h"
#include "mustafar/error.h"
#include "text/added_token_files.h"
#include "text/chat_template_impl.h"
#include "text/continued_message.h"
#include "text/jinja/interpreter.h"
#include "text/jinja/json.h"
#include "text/jinja/parser.h"

namespace mustafar {
namespace {

using jinja::Value;
namespace fs = std::filesystem;

constexpr int kMaxDepth = 600;                  // nested evaluations; about 1 KiB of stack each
constexpr uintmax_t kMaxFileBytes = 16u << 20;  // of a template or tokenizer_config.json

jinja::Template parse_source(std::string_view source) {
  try {
    return jinja::parse_template(source);
  } catch (const jinja::SyntaxError& e) {
    throw TemplateError(jinja::concat("chat template, line ", e.line, ": ", e.what()));
  }
}

std::shared_ptr<ChatTemplate::Impl> with_template(std::string source) {
  auto impl = std::make_shared<ChatTemplate::Impl>();
  jinja::Template parsed = parse_source(source);
  impl->templates["default"] = {std::move(source), std::move(parsed)};
  return impl;
}

std::string read_template(const fs::path& file) {
  std::error_code error;
  if (!fs::is_regular_file(file, error)) {
    throw TemplateError(file.string() + ": not a regular file");
  }
  const uintmax_t size = fs::file_size(file, error);
  if (error || size > kMaxFileBytes) {
    throw TemplateError(jinja::concat(file.string(), ": larger than ", kMaxFileBytes, " bytes"));
  }
  std::optional<std::string> content = read_file(file, size);
  if (!content) throw TemplateError(file.string() + ": cannot be read");
  return std::move(*content);
}

// A JSON object, or null where there is no such file.
JsonTree<> read_json(const fs::path& file) {
  std::error_code error;
  if (!fs::exists(file, error)) return {};
  try {
    auto parsed = parse_json_text(read_template(file));
    if (parsed->is_object()) return parsed;
  } catch (const nlohmann::json::exception&) {
  }
  throw TemplateError(file.string() + ": not a JSON object");
}

// "<s>" or {"content": "<s>", ...}.
std::optional<std::string> token_text(const nlohmann::json& value) {
  if (value.is_string()) return value.get<std::string>();
  if (value.is_object() && value.contains("content") && value["content"].is_string()) {
    return value["content"].get<std::string>();
  }
  return std::nullopt;
}

void read_special_tokens(const fs::path& folder, ChatTemplate::Impl* impl) {
  for (const char* file : {"tokenizer_config.json", "special_tokens_map.json"}) {
    const JsonTree<> tree = read_json(folder / file);
    const nlohmann::json& config = *tree;
    if (config.is_null()) continue;
    for (const char* name : text::kSpecialTokenNames) {
      if (!config.contains(name)) continue;
      if (const auto text = token_text(config[name])) impl->special_tokens.emplace(name, *text);
    }
  }
}

// chat_template.jinja, and others by name in a folder beside it.
std::map<std::string, std::string> jinja_files(const fs::path& folder) {
  std::map<std::string, std::string> sources;
  std::error_code error;
  if (fs::exists(folder / "chat_template.jinja", error)) {
    sources["default"] = read_template(folder / "chat_template.jinja");
  }
  fs::directory_iterator file(folder / "additional_chat_templates", error);
  for (; !error && file != fs::directory_iterator(); file.increment(error)) {
    const fs::path& path = file->path();
    if (path.extension() == ".jinja") sources[path.stem().string()] = read_template(path);
  }
  return sources;
}

// Every template of a folder by name, in the order of precedence that transformers has.
std::map<std::string, std::string> folder_sources(const fs::path& folder) {
  if (auto sources = jinja_files(folder); !sources.empty()) return sources;
  for (const char* file : {"tokenizer_config.json", "chat_template.json"}) {
    const JsonTree<> tree = read_json(folder / file);
    const nlohmann::json& config = *tree;
    if (config.is_null() || !config.contains("chat_template")) continue;
    const nlohmann::json& value = config["chat_template"];
    const std::string where = (folder / file).string() + ": chat_template";
    if (value.is_null()) continue;
    if (value.is_string()) return {{"default", value.get<std::string>()}};
    if (!value.is_array()) throw TemplateError(where + " is neither a string nor a list");
    std::map<std::string, std::string> sources;
    for (const auto& entry : value) {
      if (!entry.is_object() || !entry.contains("name") || !entry["name"].is_string() ||
          !entry.contains("template") || !entry["template"].is_string()) {
        throw TemplateError(where + " has an entry without name and template");
      }
      sources[entry["name"].get<std::string>()] = entry["template"].get<std::string>();
    }
    return sources;
  }
  return {};
}

std::string joined(const std::vector<std::string>& names) {
  std::string out;
  for (const std::string& name : names) out += (out.empty() ? "" : ", ") + name;
  return out;
}

std::tm parse_date(const std::string& date) {
  std::tm tm{};
  int end = 0;
  const int fields =
      std::sscanf(date.c_str(), "%4d-%2d-%2d%n", &tm.tm_year, &tm.tm_mon, &tm.tm_mday, &end);
  bool ok = fields == 3;
  if (ok && end < static_cast<int>(date.size())) {
    int time_end = 0;
    ok = std::sscanf(date.c_str() + end, "%*1[T ]%2d:%2d:%2d%n", &tm.tm_hour, &tm.tm_min,
                     &tm.tm_sec, &time_end) == 3 &&
         end + time_end == static_cast<int>(date.size());
  }
  ok = ok && tm.tm_year >= 1 && tm.tm_mon >= 1 && tm.tm_mon <= 12 && tm.tm_mday >= 1 &&
       tm.tm_mday <= 31 && tm.tm_hour >= 0 && tm.tm_hour < 24 && tm.tm_min >= 0 && tm.tm_min < 60 &&
       tm.tm_sec >= 0 && tm.tm_sec < 60;
  if (!ok) {
    throw std::invalid_argument("date: expected YYYY-MM-DD or YYYY-MM-DDTHH:MM:SS, got '" + date +
                                "'");
  }
  tm.tm_year -= 1900;
  tm.tm_mon -= 1;
  tm.tm_isdst = 0;
  std::tm normal = tm;  // timegm fills in the weekday and the day of the year
  timegm(&normal);
  if (normal.tm_mday != tm.tm_mday)
    throw std::invalid_argument("date: no such day: '" + date + "'");
  tm.tm_wday = normal.tm_wday;
  tm.tm_yday = normal.tm_yday;
  return tm;
}

std::tm local_time() {
  const std::time_t now = std::time(nullptr);
  std::tm tm{};
  localtime_r(&now, &tm);
  return tm;
}

bool is_plain_word(const std::string& s) {
  return !s.empty() && s.size() <= 32 && std::all_of(s.begin(), s.end(), [](unsigned char c) {
    return c < 0x80 && (std::isalnum(c) || c == '_' || c == '-');
  });
}

// A message as transformers hands it to the template: reasoning stands under each of its names. A
// role that is a plain word is not marked as text from outside, since templates build special
// tokens of it.
Value prepare_message(const Value& message, jinja::Budget& budget) {
  if (!message.is_dict()) return message;
  auto out = std::make_shared<jinja::Dict>();
  const Value* reasoning = nullptr;
  for (const char* name : {"reasoning_content", "thinking", "reasoning"}) {
    const Value* found = message.dict().find(name);
    if (!reasoning && found && !found->is_none()) reasoning = found;
  }
  if (reasoning) out->set(Value(std::string_view("thinking")), *reasoning, budget);
  for (const auto& [key, value] : message.dict().entries) {
    const bool plain_role =
        key.is_text() && key.bytes() == "role" && value.is_text() && is_plain_word(value.bytes());
    out->set(key, plain_role ? Value(std::string_view(value.bytes())) : value, budget);
  }
  if (reasoning) out->set(Value(std::string_view("reasoning_content")), *reasoning, budget);
  return Value(std::shared_ptr<const jinja::Dict>(std::move(out)));
}

Value prepare_messages(const Value& messages, jinja::Budget& budget) {
  if (!messages.is_list()) throw std::invalid_argument("messages: expected a list of messages");
  std::vector<Value> prepared;
  for (size_t i = 0; i < messages.items().size(); i++) {
    if (!messages.items()[i].is_dict()) {
      throw std::invalid_argument(jinja::concat("messages: element ", i, " is not an object but ",
                                                jinja::type_name(messages.items()[i])));
    }
    prepared.push_back(prepare_message(messages.items()[i], budget));
  }
  return Value::list(std::move(prepared));
}

RenderedChat with_ranges(jinja::Text text) {
  RenderedChat out;
  for (size_t i = 0; i < text.marks.size(); i++) {
    if (!text.marks[i]) continue;
    if (out.outside.empty() || out.outside.back().end != i) out.outside.push_back({i, i});
    out.outside.back().end = i + 1;
  }
  out.text = std::move(text.bytes);
  return out;
}

}  // namespace

const ChatTemplate::Impl::Named& ChatTemplate::Impl::choose(bool with_tools) const {
  const auto find = [&](const std::string& wanted) -> const Named* {
    const auto at = templates.find(wanted);
    return at == templates.end() ? nullptr : &at->second;
  };
  const Named* found = nullptr;
  if (!name.empty()) {
    found = find(name);
  } else {
    if (with_tools) found = find("tool_use");
    if (!found) found = find("default");
  }
  if (!found) {
    std::vector<std::string> names;
    for (const auto& [each, value] : templates) names.push_back(each);
    throw TemplateError("the model has no chat template named '" +
                        (name.empty() ? "default" : name) + "'; it has: " + joined(names));
  }
  return *found;
}

RenderedChat render_values(const ChatTemplate::Impl& impl, const Value& messages,
                           const Value& tools, const TemplateVariables& variables,
                           const ChatTemplateOptions& options) {
  const ChatTemplate::Impl::Named& chosen = impl.choose(!tools.is_none());
  jinja::Budget budget;
  budget.steps = budget.max_steps = options.max_steps;
  budget.max_bytes = static_cast<size_t>(std::max<int64_t>(options.max_output_bytes, 0));
  budget.max_depth = kMaxDepth;
  jinja::RenderInput input;
  input.now = options.date ? parse_date(*options.date) : local_time();
  const auto define = [&](std::string name, Value value) {
    input.variables.emplace_back(std::move(name), std::move(value));
  };
  define("bos_token", Value(jinja::Text()));
  define("eos_token", Value(jinja::Text()));
  for (const auto& [name, token] : impl.special_tokens) define(name, Value(jinja::Text(token)));
  if (options.bos_token) define("bos_token", Value(jinja::Text(*options.bos_token)));
  if (options.eos_token) define("eos_token", Value(jinja::Text(*options.eos_token)));
  define("documents", Value());
  for (const auto& [name, value] : variables) define(name, value);
  define("tools", tools);
  define("add_generation_prompt", Value(options.add_generation_prompt));

  if (!options.continue_final_message.empty() && options.add_generation_prompt) {
    throw std::invalid_argument("continue_final_message goes without add_generation_prompt");
  }

  int line = 1;
  try {
    Value prepared = prepare_messages(messages, budget);
    std::optional<ContinuedMessage> continued;
    if (!options.continue_final_message.empty()) {
      continued.emplace(prepared, options.continue_final_message, chosen.source, budget);
      prepared = continued->messages();
    }
    define("messages", std::move(prepared));
    jinja::Interpreter interpreter(chosen.parsed, input, budget);
    try {
      jinja::Text rendered = interpreter.render();
      return with_ranges(continued ? continued->cut(rendered) : std::move(rendered));
    } catch (...) {
      line = interpreter.line();
      throw;
    }
  } catch (const jinja::EvalError& e) {
    throw TemplateError(jinja::concat("chat template, line ", line, ": ", e.what()));
  }
}

ChatTemplate ChatTemplate::parse(std::string_view source) {
  return ChatTemplate(with_template(std::string(source)));
}

ChatTemplate ChatTemplate::from_folder(const fs::path& folder, const std::string& name) {
  const auto sources = folder_sources(folder);
  if (sources.empty()) {
    throw TemplateError(folder.string() +
                        ": no chat template (neither chat_template.jinja nor chat_template in "
                        "tokenizer_config.json); pass --chat-template with a file or one of: " +
                        joined(builtin_names()));
  }
  auto impl = std::make_shared<Impl>();
  impl->name = name;
  for (const auto& [each, source] : sources) {
    try {
      impl->templates[each] = {source, parse_source(source)};
    } catch (const TemplateError& e) {
      throw TemplateError(folder.string() + ": " + e.what());
    }
  }
  read_special_tokens(folder, impl.get());
  if (!name.empty()) impl->choose(false);
  return ChatTemplate(std::move(impl));
}

bool ChatTemplate::folder_has_template(const fs::path& folder) {
  return !folder_sources(folder).empty();
}

ChatTemplate ChatTemplate::builtin(const std::string& name) {
  for (const auto& [each, source] : builtin_chat_templates()) {
    if (each == name) return parse(source);
  }
  throw TemplateError("no built-in chat template named '" + name +
                      "'; there are: " + joined(builtin_names()));
}

std::vector<std::string> ChatTemplate::builtin_names() {
  std::vector<std::string> names;
  for (const auto& [name, source] : builtin_chat_templates()) names.push_back(name);
  return names;
}

ChatTemplate ChatTemplate::from_argument(const std::string& argument, const fs::path& folder) {
  std::shared_ptr<Impl> impl;
  const auto names = builtin_names();
  std::error_code error;
  if (std::find(names.begin(), names.end(), argument) != names.end()) {
    impl = std::make_shared<Impl>();
    for (const auto& [name, source] : builtin_chat_templates()) {
      if (name == argument) impl = with_template(source);
    }
  } else if (fs::exists(argument, error)) {
    impl = with_template(read_template(argument));
  } else if (!folder.empty() && folder_sources(folder).count(argument) > 0) {
    return from_folder(folder, argument);
  } else {
    throw TemplateError(
        "--chat-template: '" + argument +
        "' is neither a file, nor one of the model's templates, nor one of: " + joined(names));
  }
  if (!folder.empty()) read_special_tokens(folder, impl.get());
  return ChatTemplate(std::move(impl));
}

RenderedChat ChatTemplate::render_marked(std::string_view messages,
                                         const ChatTemplateOptions& options) const {
  const Value parsed = jinja::parse_json(messages, "messages");
  Value tools;
  if (!options.tools.empty()) {
    tools = jinja::parse_json(options.tools, "tools");
    if (!tools.is_list() && !tools.is_none()) throw std::invalid_argument("tools: expected a list");
  }
  TemplateVariables variables;
  if (!options.variables.empty()) {
    const Value given = jinja::parse_json(options.variables, "variables");
    if (!given.is_dict()) throw std::invalid_argument("variables: expected an object");
    for (const auto& [key, value] : given.dict().entries)
      variables.emplace_back(key.bytes(), value);
  }
  return render_values(impl(), parsed, tools, variables, options);
}

std::string ChatTemplate::render(std::string_view messages,
                                 const ChatTemplateOptions& options) const {
  return render_marked(messages, options).text;
}

const ChatTemplate::Impl& ChatTemplate::impl() const { return held(impl_, "chat template"); }

const std::string& ChatTemplate::source() const { return impl().choose(false).source; }

std::string ChatTemplate::bos_token() const {
  const auto at = impl().special_tokens.find("bos_token");
  return at == impl().special_tokens.end() ? "" : at->second;
}

std::string ChatTemplate::eos_token() const {
  const auto at = impl().special_tokens.find("eos_token");
  return at == impl().special_tokens.end() ? "" : at->second;
}

}  // namespace mustafar
