#include "cli/kv_setting.h"

#include <functional>
#include <map>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "cli/options.h"
#include "cli/report.h"
#include "mustafar/profile.h"
#include "runtime/kv_fields.h"

namespace mustafar::cli {
namespace {

std::string trimmed(const std::string& text) {
  const size_t first = text.find_first_not_of(" \t\r\n");
  if (first == std::string::npos) return {};
  return text.substr(first, text.find_last_not_of(" \t\r\n") - first + 1);
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) {
    if (part = trimmed(part); !part.empty()) parts.push_back(part);
  }
  return parts;
}

[[noreturn]] void fail(const std::string& setting, const std::string& why) {
  throw std::invalid_argument("setting \"" + setting + "\": " + why);
}

// A configuration whose profile is still a name.
struct Draft {
  KVConfig config;
  std::string profile = "none";
};

// A preset, or the default.
Draft named_setting(const std::string& name) {
  if (name == "default") return {};
  const KVPreset& preset = find_kv_preset(name);
  return {preset.config, preset.profile};
}

template <typename Number, typename Parse>
Number number(const std::string& text, const Parse& parse) {
  size_t used = 0;
  Number value = 0;
  try {
    value = parse(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  if (used == 0 || used != text.size()) throw std::invalid_argument("is not a number");
  return value;
}

double real(const std::string& text) {
  return number<double>(text,
                        [](const std::string& t, size_t* used) { return std::stod(t, used); });
}
int32_t whole(const std::string& text) {
  return number<int32_t>(text,
                         [](const std::string& t, size_t* used) { return std::stoi(t, used); });
}

// Reads text into the value of a field. Throws std::invalid_argument.
void read_value(const std::string& text, double& out) { out = real(text); }
void read_value(const std::string& text, std::optional<double>& out) { out = real(text); }
void read_value(const std::string& text, int32_t& out) { out = whole(text); }
template <typename Enum>
void read_value(const std::string& text, Enum& out) {
  parse_kv_value(text, out);
}

using Setter = std::function<void(Draft&, const std::string&)>;

const std::map<std::string, Setter>& setters() {
  static const std::map<std::string, Setter> all = [] {
    std::map<std::string, Setter> setters;
    for_each_kv_field([&]<typename T>(const KVField<T>& field) {
      setters[field.key] = [field](Draft& draft, const std::string& text) {
        T value{};
        read_value(text, value);
        set_kv_field(draft.config, field, value);
      };
    });
    setters["profile"] = [](Draft& draft, const std::string& text) { draft.profile = text; };
    return setters;
  }();
  return all;
}

}  // namespace

KVConfig parse_kv_setting(const std::string& text, const Model& model) {
  Draft draft;
  const std::vector<std::string> items = split(text, ',');
  if (items.empty()) fail(text, "is empty");
  for (size_t i = 0; i < items.size(); i++) {
    const size_t equals = items[i].find('=');
    const std::string key = trimmed(items[i].substr(0, equals));
    if (equals == std::string::npos) {
      if (i > 0) fail(text, "\"" + key + "\" must come first");
      try {
        draft = named_setting(key);
      } catch (const std::invalid_argument& error) {
        fail(text, error.what());
      }
      continue;
    }
    const auto setter = setters().find(key);
    if (setter == setters().end()) {
      std::string known;
      for (const auto& [name, unused] : setters()) known += (known.empty() ? "" : ", ") + name;
      fail(text, "unknown key \"" + key + "\"; the keys are " + known);
    }
    const std::string value = trimmed(items[i].substr(equals + 1));
    try {
      setter->second(draft, value);
    } catch (const std::invalid_argument& error) {
      fail(text, key + " \"" + value + "\" " + error.what());
    }
  }
  try {
    draft.config.validate();
  } catch (const std::invalid_argument& error) {
    fail(text, error.what());
  }
  draft.config.profile = resolve_profile(draft.profile, model, draft.config.budgeted());
  return draft.config;
}

std::vector<std::string> split_kv_settings(const std::string& list) {
  std::vector<std::string> settings;
  for (const std::string& part : split(list, ';')) {
    if (part.find('=') != std::string::npos) {
      settings.push_back(part);
    } else {
      for (const std::string& name : split(part, ',')) settings.push_back(name);
    }
  }
  return settings;
}

std::vector<std::string> read_kv_settings(const std::string& file) {
  std::vector<std::string> settings;
  for (const std::string& line : split(read_text(file), '\n')) {
    const std::string setting = trimmed(line.substr(0, line.find('#')));
    if (!setting.empty()) settings.push_back(setting);
  }
  return settings;
}

nlohmann::ordered_json identity_json(const KVConfig& config) {
  nlohmann::ordered_json json = to_json(config);
  json["profile"] = nullptr;
  if (const Profile* const profile = config.profile.get(); profile != nullptr) {
    json["profile"] = config.budgeted() ? profile->hash() : profile->transform_hash();
  }
  return json;
}

}  // namespace mustafar::cli
