// A reply with tool calls; the first byte is the size of its pieces.
#include <nlohmann/json.hpp>

#include "fuzz_input.h"
#include "mustafar/tool_calls.h"

using namespace mustafar;

namespace {

constexpr const char* kTools = R"([{"name": "add"}, {"name": "get_weather"}])";

struct Reply {
  std::string said;
  std::vector<ToolCall> calls;
};

Reply read(std::string_view text, size_t piece) {
  ToolCallReader reader(kTools);
  Reply reply;
  for (size_t at = 0; at < text.size(); at += piece) {
    reply.said += reader.push(text.substr(at, piece));
  }
  ToolCallReader::Rest rest = reader.finish();
  reply.said += rest.text;
  reply.calls = std::move(rest.calls);
  return reply;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string text = fuzz::text(data + 1, size - 1);
  const Reply whole = read(text, text.size() + 1), pieces = read(text, 1 + data[0] % 32);
  if (whole.said != pieces.said || whole.calls.size() != pieces.calls.size()) std::abort();
  if (whole.calls.empty() && whole.said != text) std::abort();
  for (const ToolCall& call : whole.calls) {
    if (call.name != "add" && call.name != "get_weather") std::abort();
    if (!nlohmann::json::parse(call.arguments).is_object()) std::abort();
  }
  return 0;
}
