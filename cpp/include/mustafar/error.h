// Typed errors. Nothing that a user, a file or a token id can cause aborts: it throws one of these,
// or std::invalid_argument for an argument out of its documented range (ValueError in Python).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace mustafar {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A model folder, config or weight file that can't be used; the message names file, field and
// offset.
class ModelError : public Error {
 public:
  using Error::Error;
};

// A tokenizer.json that can't be used, or text that can't be encoded.
class TokenizerError : public Error {
 public:
  using Error::Error;
};

// A chat template that doesn't parse, fails, or raises an exception of its own.
class TemplateError : public Error {
 public:
  using Error::Error;
};

// Memory, or a budget set by the caller, is exhausted; the message names the option, need and
// limit.
class OutOfMemory : public Error {
 public:
  using Error::Error;
};

// More tokens than the session's or the model's context holds; the message names both.
class ContextOverflow : public Error {
 public:
  using Error::Error;
};

// A device that was asked for by name can't be used; the message says what is missing: support in
// this build, a driver, a GPU, or code for that GPU.
class DeviceError : public Error {
 public:
  using Error::Error;
};

// A session used after close or while another call or a generation uses it, an engine used after
// close, a handle that was moved from, or a state file that does not match.
class StateError : public Error {
 public:
  using Error::Error;
};

// The caller asked for the work to stop; the session is as it was before the call. Calls of several
// steps, Session::start and those of Chat: as it was before the step.
class Cancelled : public Error {
 public:
  using Error::Error;
};

// As many requests wait for an engine as it was told to let wait: try again later.
class QueueFull : public Error {
 public:
  using Error::Error;
};

// Beside one of the above: a file or a folder that is not there. In Python such an error is a
// FileNotFoundError too.
class MissingFile {
 public:
  virtual ~MissingFile() = default;
};

template <typename E>
class Missing final : public E, public MissingFile {
 public:
  using E::E;
};

}  // namespace mustafar
