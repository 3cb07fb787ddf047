#include "cli/eval/dialogue.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "cli/report.h"
#include "mustafar/error.h"

namespace mustafar::cli {
namespace {

using Json = nlohmann::ordered_json;

std::string plain_question(const std::string& question, const std::string& reply_start) {
  return "Question: " + question + "\nAnswer:" + (reply_start.empty() ? "" : " " + reply_start);
}

// The ids of `text` from byte `at` on; bytes of `chat.outside` stay text.
std::vector<int32_t> encode_rendered(const Tokenizer& tokenizer, const RenderedChat& chat,
                                     const std::string& text, size_t at) {
  std::vector<TextRange> outside;
  for (const TextRange& range : chat.outside) {
    if (range.end <= at) continue;
    outside.push_back({std::max(range.begin, at) - at, range.end - at});
  }
  return tokenizer.encode_chat(std::string_view(text).substr(at), outside);
}

}  // namespace

Dialogue::Dialogue(const Model& model, bool use_chat) : model_(model) {
  model.tokenizer();
  if (use_chat && ChatTemplate::folder_has_template(model.folder())) {
    chat_ = model.tokenizer().chat_template();
  }
}

std::vector<std::string> Dialogue::stop_texts() const {
  return chat_ ? std::vector<std::string>{} : std::vector<std::string>{"\n"};
}

Dialogue::Opening Dialogue::open(const std::string& document, const std::string& question,
                                 const std::string& reply_start) const {
  const Tokenizer& tokenizer = model_.tokenizer();
  std::vector<int32_t> all, before;
  if (!chat_) {
    all = tokenizer.encode(document + "\n\n" + plain_question(question, reply_start));
    before = tokenizer.encode(document);
  } else {
    const Json messages =
        Json::array({{{"role", "user"}, {"content", document + "\n\n" + question}}});
    const RenderedChat chat =
        chat_->render_marked(dump(messages), ChatTemplateOptions::before_reply());
    const size_t at = chat.text.find(document);
    if (at == std::string::npos) {
      throw TemplateError("the chat template does not leave a document as it is: use --no-chat");
    }
    all = encode_rendered(tokenizer, chat, chat.text + reply_start, 0);
    RenderedChat head = chat;
    head.text.resize(at + document.size());
    std::erase_if(head.outside, [&](const TextRange& r) { return r.begin >= head.text.size(); });
    for (TextRange& range : head.outside) range.end = std::min(range.end, head.text.size());
    before = encode_rendered(tokenizer, head, head.text, 0);
  }
  // Where both read the same: a token may span the document's end.
  const auto split = std::mismatch(all.begin(), all.end(), before.begin(), before.end()).first;
  return {{all.begin(), split}, {split, all.end()}};
}

std::vector<int32_t> Dialogue::next(const std::string& question, const std::string& reply_start,
                                    std::optional<int32_t> last) const {
  const Tokenizer& tokenizer = model_.tokenizer();
  if (!chat_) return tokenizer.encode("\n" + plain_question(question, reply_start), false);
  const std::string reply = "What was said.";
  const Json messages = Json::array({{{"role", "user"}, {"content", "A question."}},
                                     {{"role", "assistant"}, {"content", reply}},
                                     {{"role", "user"}, {"content", question}}});
  const RenderedChat chat =
      chat_->render_marked(dump(messages), ChatTemplateOptions::before_reply());
  const size_t at = chat.text.find(reply);
  if (at == std::string::npos) {
    throw TemplateError("the chat template does not leave a reply as it is: use --no-chat");
  }
  std::vector<int32_t> ids =
      encode_rendered(tokenizer, chat, chat.text + reply_start, at + reply.size());
  if (last && !ids.empty() && ids[0] == *last) ids.erase(ids.begin());
  return ids;
}

}  // namespace mustafar::cli
