// The public tokenizer: added tokens -> normalizer -> pre-tokenizer -> BPE -> post-processor, and
// the decoder for the way back.
#include "mustafar/tokenizer.h"

#include <algorithm>
#include <filesystem>
#include <mutex>
#include <utility>

#include "core/fork.h"
#include "core/held.h"
#include "mustafar/error.h"
#include "text/added_token_files.h"
#include "text/added_tokens.h"
#include "text/bpe.h"
#include "text/decoder.h"
#include "text/normalizer.h"
#include "text/post_processor.h"
#include "text/pre_tokenizer.h"
#include "text/tokenizer_json.h"
#include "text/unicode/utf8.h"

namespace mustafar {

namespace {

// Working memory of one encode call.
struct EncodeScratch {
  explicit EncodeScratch(size_t text_bytes) : bpe(text_bytes) {}
  text::BpeScratch bpe;
  text::MatchScratch match;
  text::PreTokenized pre_tokenized;
  std::vector<text::AddedTokens::Piece> raw_pieces, normalized_pieces;
};

text::BpeModel make_model(const text::TokenizerJson& json, const text::AddedTokens& added) {
  const text::JsonField model = json.field().at("model");
  if (model.has("type") && model.at("type").string() != "BPE") {
    model.unsupported_type(model.at("type").string(), "BPE");
  }
  if (!json.has_vocab) model.fail("field 'vocab' is missing or no object");
  if (!json.has_merges) model.fail("field 'merges' is missing or no array");
  for (const char* name : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (model.has(name) && !model.at(name).string().empty()) {
      model.at(name).fail("is not supported");
    }
  }
  if (const text::JsonField dropout = model.get("dropout"); !dropout.is_null()) {
    if (!dropout.is_zero()) dropout.fail("random merges are not supported");
  }
  text::Vocab vocab = text::build_vocab(json, added.max_id(), added.size());
  text::BpeOptions options;
  options.byte_fallback = model.boolean_or("byte_fallback", false);
  options.fuse_unk = model.boolean_or("fuse_unk", false);
  options.ignore_merges = model.boolean_or("ignore_merges", false);
  if (model.has("unk_token")) {
    const std::string unk = model.at("unk_token").string();
    auto id = vocab.find(unk);
    if (!id) id = added.find(unk);
    if (!id) model.at("unk_token").fail(unicode::in_quotes(unk) + " is not in the vocabulary");
    options.unk_id = *id;
  }
  text::MergeTable merges = text::build_merges(json, vocab);
  return text::BpeModel(std::move(vocab), std::move(merges.map), merges.pairs, options);
}

}  // namespace

struct Tokenizer::Impl {
  explicit Impl(const text::TokenizerJson& json)
      : normalizer(text::Normalizer::parse(json.field().get("normalizer"))),
        pre_tokenizer(text::PreTokenizer::parse(json.field().get("pre_tokenizer"))),
        added(text::AddedTokens::parse(json.field().get("added_tokens"))),
        model(make_model(json, added)),
        decoder(text::Decoder::parse(json.field().get("decoder"))) {
    added.prepare(model.vocab(), normalizer, json.file);
    post_processor =
        text::PostProcessor::parse(json.field().get("post_processor"), [this](int64_t id) {
          return id >= 0 && id < model.vocab().size() && contains(static_cast<int32_t>(id));
        });
  }

  bool contains(int32_t id) const { return added.find(id) || model.vocab().contains(id); }

  // As spelled in tokenizer.json; none for an id that is no token.
  std::optional<std::string_view> find_token(int32_t id) const {
    if (const text::AddedToken* token = added.find(id)) return token->content;
    if (model.vocab().contains(id)) return model.vocab().token(id);
    return std::nullopt;
  }
  // Throws TokenizerError for an id that is no token.
  std::string_view token(int32_t id) const {
    if (const auto found = find_token(id)) return *found;
    throw TokenizerError("token id " + std::to_string(id) + " is not in the vocabulary of " +
                         std::to_string(model.vocab().size()) + " ids");
  }
  // Models pad their vocabulary, so an id that is no token may well be generated: it has no text.
  void decode(int32_t id, bool skip_special, text::DecodeRun* run) const {
    if (id < 0) throw TokenizerError("token id " + std::to_string(id) + " is negative");
    const auto found = find_token(id);
    if (found && !(skip_special && is_special(id))) run->token(*found);
  }

  bool is_special(int32_t id) const {
    const text::AddedToken* token = added.find(id);
    return token && token->special;
  }

  // A part of the text without added tokens that are matched before normalization.
  // at_start: it is where the text starts.
  void encode_raw(std::string_view raw, bool at_start, bool parse_special, EncodeScratch* scratch,
                  std::vector<int32_t>* ids) const {
    std::string storage;
    std::string_view normalized = raw;
    if (!normalizer.empty()) {
      storage = normalizer.apply(raw, &scratch->match);
      if (storage.size() > text::kMaxTextBytes) {
        throw TokenizerError("the normalized text of " + std::to_string(storage.size()) +
                             " bytes is longer than " + std::to_string(text::kMaxTextBytes));
      }
      normalized = storage;
    }
    if (!added.any(true)) return encode_normalized(normalized, at_start, scratch, ids);
    added.split(normalized, true, parse_special, &scratch->normalized_pieces);
    for (const auto& piece : scratch->normalized_pieces) {
      if (piece.id >= 0) {
        ids->push_back(piece.id);
      } else {
        encode_normalized(normalized.substr(piece.begin, piece.end - piece.begin),
                          at_start && piece.begin == 0, scratch, ids);
      }
    }
  }

  void encode_normalized(std::string_view text, bool at_start, EncodeScratch* scratch,
                         std::vector<int32_t>* ids) const {
    if (text.empty()) return;
    if (pre_tokenizer.empty()) return model.encode(text, &scratch->bpe, ids);
    text::PreTokenized& words = scratch->pre_tokenized;
    pre_tokenizer.apply(text, at_start, &scratch->match, &words);
    for (const text::Span& span : words.spans) {
      model.encode(words.text.substr(span.begin, span.end - span.begin), &scratch->bpe, ids);
    }
  }

  text::Normalizer normalizer;
  text::PreTokenizer pre_tokenizer;
  text::AddedTokens added;
  text::BpeModel model;
  text::Decoder decoder;
  text::PostProcessor post_processor;

  // Sets bos_id and eos_ids by what the folder says.
  void find_ends() {
    const text::FolderEnds ends = text::read_ends(folder);
    const auto add = [&](std::optional<int32_t> id, std::vector<int32_t>* ids) {
      if (id && std::count(ids->begin(), ids->end(), *id) == 0) ids->push_back(*id);
    };
    const auto find = [&](const std::vector<std::string>& tokens, const std::vector<int64_t>& ids) {
      std::vector<int32_t> found;
      for (const std::string& token : tokens) {
        add(added.find(token) ? added.find(token) : model.vocab().find(token), &found);
      }
      for (const int64_t id : ids) {
        const bool is_id =
            id >= 0 && id < model.vocab().size() && contains(static_cast<int32_t>(id));
        if (is_id) add(static_cast<int32_t>(id), &found);
      }
      return found;
    };
    std::vector<int32_t> begins = find(ends.bos_tokens, ends.bos_ids);
    if (begins.empty()) begins = post_processor.prefix;
    if (!begins.empty()) bos_id = begins.front();
    eos_ids = find(ends.eos_tokens, ends.eos_ids);
  }

  std::filesystem::path folder;  // of tokenizer.json
  std::optional<int32_t> bos_id;
  std::vector<int32_t> eos_ids;
  mutable ForkSafeMutex chat_template_mutex;
  mutable std::optional<ChatTemplate> chat_template;  // the folder's, once asked for
};

Tokenizer Tokenizer::load(const std::filesystem::path& path) {
  std::error_code ignored;
  const bool is_folder = std::filesystem::is_directory(path, ignored);
  text::TokenizerJson json = text::read_tokenizer_json(path);
  if (is_folder) text::add_tokens_of_folder(path, &json);
  auto impl = std::make_shared<Impl>(json);
  impl->folder = is_folder ? path : path.parent_path();
  if (impl->folder.empty()) impl->folder = ".";
  impl->find_ends();
  return Tokenizer(std::move(impl));
}

namespace {

void check_size(std::string_view text) {
  if (text.size() > text::kMaxTextBytes) {
    throw TokenizerError("a text of " + std::to_string(text.size()) + " bytes; at most " +
                         std::to_string(text::kMaxTextBytes) + " are encoded at once");
  }
}

}  // namespace

const Tokenizer::Impl& Tokenizer::impl() const { return held(impl_, "tokenizer"); }

std::vector<int32_t> Tokenizer::encode_chat(std::string_view text,
                                            std::span<const TextRange> outside) const {
  check_size(text);
  if (!unicode::is_valid_utf8(text)) throw TokenizerError("a rendered chat that is not UTF-8");
  std::vector<int32_t> ids;
  EncodeScratch scratch(text.size());
  impl().added.split_chat(text, outside, &scratch.raw_pieces);
  for (const auto& piece : scratch.raw_pieces) {
    if (piece.id >= 0) {
      ids.push_back(piece.id);
    } else {
      impl().encode_raw(text.substr(piece.begin, piece.end - piece.begin), piece.begin == 0,
                        /*parse_special=*/false, &scratch, &ids);
    }
  }
  return ids;
}

std::vector<int32_t> Tokenizer::apply_chat_template(
    std::string_view messages, const ChatTemplateOptions& options,
    const std::optional<ChatTemplate>& chat_template) const {
  const ChatTemplate chosen = chat_template ? *chat_template : this->chat_template();
  const RenderedChat rendered = chosen.render_marked(messages, options);
  return encode_chat(rendered.text, rendered.outside);
}

ChatTemplate Tokenizer::chat_template() const {
  const Impl& shared = impl();
  {
    const std::lock_guard lock(shared.chat_template_mutex);
    if (shared.chat_template) return *shared.chat_template;
  }
  const ChatTemplate read = ChatTemplate::from_folder(shared.folder);
  const std::lock_guard lock(shared.chat_template_mutex);
  if (!shared.chat_template) shared.chat_template = read;
  return *shared.chat_template;
}

ChatTemplate Tokenizer::chat_template(const std::string& name_or_file) const {
  return ChatTemplate::from_argument(name_or_file, impl().folder);
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool add_special,
                                       bool parse_special) const {
  check_size(text);
  std::string replaced;
  if (!unicode::is_valid_utf8(text)) {
    replaced = unicode::replace_invalid_utf8(text);
    text = replaced;
  }
  std::vector<int32_t> ids;
  ids.reserve(text.size() / 4 + 8);
  if (add_special) ids = impl().post_processor.prefix;
  EncodeScratch scratch(text.size());
  if (!impl().added.any(false)) {
    if (!text.empty()) impl().encode_raw(text, true, parse_special, &scratch, &ids);
  } else {
    impl().added.split(text, false, parse_special, &scratch.raw_pieces);
    for (const auto& piece : scratch.raw_pieces) {
      if (piece.id >= 0) {
        ids.push_back(piece.id);
      } else {
        impl().encode_raw(text.substr(piece.begin, piece.end - piece.begin), piece.begin == 0,
                          parse_special, &scratch, &ids);
      }
    }
  }
  if (add_special) {
    const auto& suffix = impl().post_processor.suffix;
    ids.insert(ids.end(), suffix.begin(), suffix.end());
  }
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> token_ids, bool skip_special) const {
  text::DecodeRun run(impl().decoder);
  for (const int32_t id : token_ids) impl().decode(id, skip_special, &run);
  run.finish();
  return run.take();
}

int32_t Tokenizer::vocab_size() const { return impl().model.vocab().size(); }

std::optional<int32_t> Tokenizer::token_to_id(std::string_view token) const {
  if (const auto id = impl().added.find(token)) return id;
  return impl().model.vocab().find(token);
}

std::string Tokenizer::id_to_token(int32_t token_id) const {
  return std::string(impl().token(token_id));
}

std::string Tokenizer::token_bytes(int32_t token_id) const {
  return impl().decoder.bytes_of(impl().token(token_id));
}

bool Tokenizer::is_special(int32_t token_id) const { return impl().is_special(token_id); }

std::optional<int32_t> Tokenizer::bos_id() const { return impl().bos_id; }
std::vector<int32_t> Tokenizer::eos_ids() const { return impl().eos_ids; }
std::vector<int32_t> Tokenizer::special_prefix() const { return impl().post_processor.prefix; }

struct Tokenizer::Stream::State {
  std::shared_ptr<const Impl> impl;  // keeps what the run refers to
  bool skip_special;
  text::DecodeRun run;
  // The end of the text before, which the run may still hold: it is left out as far as it comes.
  std::string before;

  std::string take() {
    std::string text = run.take();
    if (before.empty() || text.empty()) return text;
    size_t same = 0;
    while (same < text.size() && same < before.size() && text[same] == before[same]) same++;
    // Where they differ the tokens have made another text of their last bytes, which counts.
    before.erase(0, same == text.size() ? same : before.size());
    while (same > 0 && same < text.size() && unicode::is_continuation(text[same])) same--;
    text.erase(0, same);
    return text;
  }
};

namespace {

// Enough for what a decoder can hold back, the start of a character, and for it to have begun.
constexpr int kTokensBefore = 16;

}  // namespace

Tokenizer::Stream::Stream(const Tokenizer& tokenizer, bool skip_special,
                          std::span<const int32_t> after)
    : state_(std::make_unique<State>(
          State{tokenizer.impl_, skip_special, text::DecodeRun(tokenizer.impl().decoder), {}})) {
  const Impl& impl = tokenizer.impl();
  size_t begin = after.size();
  for (int with_text = 0; begin > 0 && with_text < kTokensBefore; begin--) {
    const int32_t id = after[begin - 1];
    if (impl.find_token(id) && !(skip_special && impl.is_special(id))) with_text++;
  }
  if (begin == after.size()) return;
  text::DecodeRun whole(impl.decoder);
  for (const int32_t id : after.subspan(begin)) {
    impl.decode(id, skip_special, &state_->run);
    impl.decode(id, skip_special, &whole);
  }
  state_->run.settle();
  state_->run.take();
  whole.settle();
  whole.take();
  whole.finish();
  state_->before = whole.take();
}
Tokenizer::Stream::~Stream() = default;
Tokenizer::Stream::Stream(Stream&&) noexcept = default;
Tokenizer::Stream& Tokenizer::Stream::operator=(Stream&&) noexcept = default;

Tokenizer::Stream::State& Tokenizer::Stream::state() const {
  return held(state_, "stream of tokens");
}

std::string Tokenizer::Stream::push(int32_t token_id) {
  State& s = state();
  s.impl->decode(token_id, s.skip_special, &s.run);
  return s.take();
}

std::string Tokenizer::Stream::settle() {
  state().run.settle();
  return state().take();
}

std::string Tokenizer::Stream::flush() {
  State& s = state();
  s.run.finish();
  std::string rest = s.take();
  s.run = text::DecodeRun(s.impl->decoder);
  s.before.clear();
  return rest;
}

}  // namespace mustafar
