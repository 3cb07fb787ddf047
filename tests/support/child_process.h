// A forked child that must come to an end.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <exception>
#include <string>

namespace mustafar::testing {

// The status that a forked child ends with, as waitpid() has it: 0 where body returns true.
template <typename Body>
int status_of_child(Body&& body) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(60);  // ends a child that hangs
    ::_exit(body() ? 0 : 1);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return status;
}

// Runs body in a forked child, which has it done within a minute; what it returns, "" for good, or
// throws is the failure that the parent reports.
template <typename Body>
::testing::AssertionResult in_child(Body&& body) {
  int ends[2];
  if (::pipe(ends) != 0) return ::testing::AssertionFailure() << "no pipe";
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(60);  // ends a child that hangs
    std::string failure;
    try {
      failure = body();
    } catch (const std::exception& error) {
      failure = std::string("threw ") + error.what();
    }
    const bool told = ::write(ends[1], failure.data(), failure.size()) >= 0;
    ::_exit(failure.empty() && told ? 0 : 1);
  }
  ::close(ends[1]);
  std::string failure;
  char piece[256];
  for (ssize_t n; (n = ::read(ends[0], piece, sizeof(piece))) > 0;) failure.append(piece, n);
  ::close(ends[0]);
  int status = 0;
  ::waitpid(child, &status, 0);
  if (status == 0) return ::testing::AssertionSuccess();
  if (WIFSIGNALED(status)) {
    return ::testing::AssertionFailure() << "the child was ended by signal " << WTERMSIG(status);
  }
  return ::testing::AssertionFailure() << failure;
}

}  // namespace mustafar::testing
