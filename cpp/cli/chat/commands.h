// What a person can type at the chat prompt beside messages.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "mustafar/sampling.h"

namespace mustafar::cli {

struct ChatCommand {
  const char* name;       // "/read"
  const char* arguments;  // "FILE [TEXT]"
  const char* help;
};

const std::vector<ChatCommand>& chat_commands();
std::string chat_help();  // one line per command

// The file and the text of "FILE [TEXT]": the file is the longest beginning that names one, so that
// names may have spaces; else the first word.
struct FileAndText {
  std::string file, text;
};
FileAndText split_file(const std::string& argument);
std::string expand_home(const std::string& path);  // "~/x" under $HOME

// Completions for the line up to the cursor: commands, files, sampling parameters.
std::vector<std::string> complete_chat_line(const std::string& line);

// Sets parameters from "name=value name=value ..." or "name value", as show_parameters prints them.
// Throws std::invalid_argument naming what is wrong; the parameters are then as before.
void set_parameters(const std::string& assignments, SamplingParams* params, int64_t vocab_size);
std::string show_parameters(const SamplingParams& params);  // with every field decided

}  // namespace mustafar::cli
