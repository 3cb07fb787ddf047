// A conversation with a tool: call_tools MODEL_FOLDER TEXT
#include <mustafar/chat.h>
#include <mustafar/model.h>
#include <mustafar/tool_calls.h>

#include <algorithm>
#include <cstdint>
#include <ctime>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

namespace {

constexpr const char* kTools = R"([{"type": "function", "function": {
  "name": "get_time", "description": "The time of day in UTC, as HH:MM.",
  "parameters": {"type": "object", "properties": {}}}}])";

std::string get_time() {
  const std::time_t now = std::time(nullptr);
  char text[8] = "";
  std::strftime(text, sizeof(text), "%H:%M", std::gmtime(&now));
  return text;
}

// Prints a reply as it is made, without its calls; returns those.
std::vector<mustafar::ToolCall> say(mustafar::Chat& chat, mustafar::ChatReply reply) {
  mustafar::ToolCallReader reader(kTools, chat.session().model().tokenizer());
  std::string piece, text;
  size_t seen = 0;
  while (reply.step(piece)) {
    std::vector<int32_t> ids = reply.result().token_ids;
    ids.erase(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(std::min(seen, ids.size())));
    seen += ids.size();
    const std::string said = reader.push(piece, ids);
    std::cout << said << std::flush;
    text += said;
  }
  mustafar::ToolCallReader::Rest rest = reader.finish();
  std::cout << rest.text << "\n";
  if (!rest.calls.empty()) {
    std::vector<mustafar::ChatMessage> messages = chat.messages();
    messages.back() = mustafar::call_message(text + rest.text, rest.calls);
    chat.set_messages(std::move(messages));
  }
  return std::move(rest.calls);
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 3) {
    std::cerr << "usage: call_tools MODEL_FOLDER TEXT\n";
    return 2;
  }
  const mustafar::Model model = mustafar::Model::load(argv[1]);
  mustafar::Session session(model, mustafar::KVConfig::preset("lossless", model));
  mustafar::Chat chat(session, {.tools = kTools});
  mustafar::SamplingParams params;
  params.max_new_tokens = 200;

  std::vector<mustafar::ToolCall> calls = say(chat, chat.start(argv[2], params));
  for (int turn = 0; turn < 3 && !calls.empty(); turn++) {
    for (size_t i = 0; i < calls.size(); i++) {
      std::cout << "[" << calls[i].name << " " << calls[i].arguments << "]\n";
      chat.add(mustafar::result_message(calls[i], i, get_time()));
    }
    calls = say(chat, chat.reply(params));
  }
  return 0;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 1;
}
