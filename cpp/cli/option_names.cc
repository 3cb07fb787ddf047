#include <cctype>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cli/options.h"
#include "runtime/kv_fields.h"

namespace mustafar::cli {
namespace {

using Names = std::vector<std::pair<std::string, std::string>>;

const Names& names() {
  static const Names kNames = [] {
    Names all = {{"max_tokens", "-c"},
                 {"kv_budget", "--kv-budget"},
                 {"max_new_tokens", "-n"},
                 {"min_new_tokens", "--min-tokens"},
                 {"temperature", "--temp"},
                 {"top_k", "--top-k"},
                 {"top_p", "--top-p"},
                 {"min_p", "--min-p"},
                 {"repetition_penalty", "--repeat-penalty"},
                 {"presence_penalty", "--presence-penalty"},
                 {"frequency_penalty", "--frequency-penalty"},
                 {"penalty_window", "--repeat-last-n"},
                 {"logit_bias", "--logit-bias"},
                 {"logprobs", "--logprobs"},
                 {"stop", "--stop"},
                 {"threads", "-t"},
                 {"device", "--device"},
                 {"dtype", "--dtype"},
                 {"weights", "-w"}};
    for_each_kv_field([&](const auto& field) { all.emplace_back(field.name, field.option); });
    return all;
  }();
  return kNames;
}

// Of a longer word, a path or something quoted, which is not the name of an argument.
bool continues_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) ||
         std::string_view("_-./\"'[]").find(c) != std::string_view::npos;
}

}  // namespace

std::string with_option_names(const std::string& message) {
  std::string out = message;
  for (const auto& [name, option] : names()) {
    const bool is_plain_word = name.find('_') == std::string::npos;  // a name only at the beginning
    for (size_t at = 0; (at = out.find(name, at)) != std::string::npos;) {
      const size_t end = at + name.size();
      const bool whole = (at == 0 || !continues_word(out[at - 1])) &&
                         (end == out.size() || !continues_word(out[end]) ||
                          (out[end] == '.' && (end + 1 == out.size() || out[end + 1] == ' ')));
      if (whole && (at == 0 || !is_plain_word)) {
        out.replace(at, name.size(), option);
        at += option.size();
      } else {
        at = end;
      }
    }
  }
  return out;
}

}  // namespace mustafar::cli
