// `mustafar completion`: what a shell reads to complete the command's words.
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "cli/commands.h"

namespace mustafar::cli {
namespace {

struct Word {
  std::string name;  // "chat", or "--temp"
  std::string help;
  bool takes_value = false;
};

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

std::vector<const CLI::App*> commands_of(const CLI::App& app) {
  return app.get_subcommands([](const CLI::App*) { return true; });
}

std::vector<Word> options_of(const CLI::App& app) {
  std::vector<Word> words;
  for (const CLI::Option* option : app.get_options()) {
    const bool takes_value = option->get_items_expected_max() > 0;
    const std::string help = first_line(option->get_description());
    for (const std::string& name : option->get_lnames()) {
      words.push_back({"--" + name, help, takes_value});
    }
    for (const std::string& name : option->get_snames()) {
      words.push_back({"-" + name, help, takes_value});
    }
  }
  return words;
}

// In single quotes for a shell; of fish a backslash is special there too.
std::string quoted(const std::string& text, bool fish = false) {
  std::string out = "'";
  for (const char c : text) {
    if (fish && (c == '\'' || c == '\\')) {
      out += '\\';
      out += c;
    } else if (c == '\'') {
      out += "'\\''";
    } else {
      out += c;
    }
  }
  return out + "'";
}

std::string names_of(const std::vector<Word>& words) {
  std::string names;
  for (const Word& word : words) names += (names.empty() ? "" : " ") + word.name;
  return names;
}

std::string bash_script(const CLI::App& app) {
  std::string commands, cases;
  for (const CLI::App* command : commands_of(app)) {
    commands += command->get_name() + " ";
    cases += "    " + command->get_name() + ") options=" + quoted(names_of(options_of(*command))) +
             " ;;\n";
  }
  return "# bash completion for mustafar\n"
         "_mustafar() {\n"
         "  local current=${COMP_WORDS[COMP_CWORD]} options=\n"
         "  COMPREPLY=()\n"
         "  if [[ $COMP_CWORD -eq 1 ]]; then\n"
         "    COMPREPLY=($(compgen -W " +
         quoted(commands + names_of(options_of(app))) +
         " -- \"$current\"))\n"
         "    return\n"
         "  fi\n"
         "  [[ $current == -* ]] || return  # values are files, or nothing that is known\n"
         "  case ${COMP_WORDS[1]} in\n" +
         cases +
         "  esac\n"
         "  COMPREPLY=($(compgen -W \"$options\" -- \"$current\"))\n"
         "}\n"
         "complete -o default -F _mustafar mustafar\n";
}

// Words as _describe takes them: 'name:help', with colons of the name escaped.
std::string zsh_words(const std::vector<Word>& words) {
  std::string out;
  for (const Word& word : words) out += " " + quoted(word.name + ":" + word.help);
  return out;
}

std::string zsh_script(const CLI::App& app) {
  std::vector<Word> commands;
  std::string cases;
  for (const CLI::App* command : commands_of(app)) {
    commands.push_back({command->get_name(), first_line(command->get_description())});
    cases +=
        "    " + command->get_name() + ") options=(" + zsh_words(options_of(*command)) + " ) ;;\n";
  }
  return "#compdef mustafar\n"
         "_mustafar() {\n"
         "  local -a commands options\n"
         "  if (( CURRENT == 2 )); then\n"
         "    commands=(" +
         zsh_words(commands) +
         " )\n"
         "    options=(" +
         zsh_words(options_of(app)) +
         " )\n"
         "    _describe command commands -- options\n"
         "    return\n"
         "  fi\n"
         "  case $words[2] in\n" +
         cases +
         "  esac\n"
         "  if [[ $PREFIX == -* ]]; then\n"
         "    _describe -o option options\n"
         "  else\n"
         "    _files\n"
         "  fi\n"
         "}\n"
         "if [[ $funcstack[1] == _mustafar ]]; then _mustafar \"$@\"; else compdef _mustafar "
         "mustafar; fi\n";
}

std::string fish_option(const Word& word, const std::string& condition) {
  const bool is_long = word.name.starts_with("--");
  return "complete -c mustafar -n " + quoted(condition, true) + (is_long ? " -l " : " -s ") +
         word.name.substr(is_long ? 2 : 1) + (word.takes_value ? " -r" : "") + " -d " +
         quoted(word.help, true) + "\n";
}

std::string fish_script(const CLI::App& app) {
  std::string out = "# fish completion for mustafar\n";
  for (const Word& word : options_of(app)) out += fish_option(word, "__fish_use_subcommand");
  for (const CLI::App* command : commands_of(app)) {
    const std::string& name = command->get_name();
    out += "complete -c mustafar -f -n __fish_use_subcommand -a " + name + " -d " +
           quoted(first_line(command->get_description()), true) + "\n";
    for (const Word& word : options_of(*command)) {
      out += fish_option(word, "__fish_seen_subcommand_from " + name);
    }
  }
  return out;
}

}  // namespace

void add_completion(CLI::App& app, Run& run) {
  const auto shell = std::make_shared<std::string>();
  CLI::App* command =
      app.add_subcommand("completion", "Print what makes a shell complete this command's words");
  command->add_option("shell", *shell, "bash, zsh or fish")
      ->required()
      ->check(CLI::IsMember({"bash", "zsh", "fish"}));
  command->footer("source <(mustafar completion bash)");
  command->callback([shell, &app, &run] {
    run = [shell, &app] {
      const std::string script = *shell == "bash"  ? bash_script(app)
                                 : *shell == "zsh" ? zsh_script(app)
                                                   : fish_script(app);
      std::fputs(script.c_str(), stdout);
      return kExitOk;
    };
  });
}

}  // namespace mustafar::cli
