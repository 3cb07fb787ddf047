#include "text/post_processor.h"

#include <string>

#include "text/unicode/utf8.h"

namespace mustafar::text {

namespace {

using IsToken = std::function<bool(int64_t)>;

int32_t token_id(const JsonField& field, const IsToken& is_token) {
  const int64_t id = field.integer();
  if (!is_token(id)) field.fail("id " + std::to_string(id) + " is no token of this tokenizer");
  return static_cast<int32_t>(id);
}

// TemplateProcessing's "single": special tokens before and after the sequence A.
void add_template(const JsonField& field, const IsToken& is_token, PostProcessor* out) {
  std::vector<int32_t> before, after;
  bool seen = false;
  const JsonField single = field.at("single");
  for (const JsonField& piece : single.elements()) {
    if (piece.has("Sequence")) {
      const std::string id = piece.at("Sequence").at("id").string();
      if (id != "A" || seen)
        piece.fail("a text is one sequence 'A', found " + unicode::in_quotes(id));
      seen = true;
      continue;
    }
    const std::string name = piece.at("SpecialToken").at("id").string();
    const JsonField token = field.at("special_tokens").at(name);
    for (const JsonField& id : token.at("ids").elements()) {
      (seen ? after : before).push_back(token_id(id, is_token));
    }
  }
  if (!seen) single.fail("has no sequence 'A'");
  out->prefix.insert(out->prefix.begin(), before.begin(), before.end());
  out->suffix.insert(out->suffix.end(), after.begin(), after.end());
}

void add(const JsonField& field, const IsToken& is_token, PostProcessor* out) {
  const std::string type = field.at("type").string();
  if (type == "Sequence") {
    for (const JsonField& member : field.at("processors").elements()) add(member, is_token, out);
  } else if (type == "TemplateProcessing") {
    add_template(field, is_token, out);
  } else if (type == "RobertaProcessing" || type == "BertProcessing") {
    const auto id_of = [&](const char* name) {
      const std::vector<JsonField> pair = field.at(name).elements();
      if (pair.size() != 2) field.at(name).fail("must be a pair of token and id");
      return token_id(pair[1], is_token);
    };
    out->prefix.insert(out->prefix.begin(), id_of("cls"));
    out->suffix.push_back(id_of("sep"));
  } else if (type != "ByteLevel") {  // which only trims offsets
    field.unsupported_type(type,
                           "TemplateProcessing, RobertaProcessing, BertProcessing, ByteLevel and "
                           "Sequence");
  }
}

}  // namespace

PostProcessor PostProcessor::parse(const JsonField& field, const IsToken& is_token) {
  PostProcessor out;
  if (!field.is_null()) add(field, is_token, &out);
  return out;
}

}  // namespace mustafar::text
