// A system call that failed: the operation and its errno, as an exception. Outcomes that callers expect
// (EAGAIN, EEXIST) are return values instead and never come this way.
#pragma once

#include <cerrno>
#include <string>
#include <system_error>

namespace memferry {

class SystemError : public std::system_error {
 public:
  SystemError(std::string operation, int error)
      : std::system_error(error, std::generic_category(), operation), operation_(std::move(operation)) {}
  [[nodiscard]] const std::string& operation() const { return operation_; }
  [[nodiscard]] int error() const { return code().value(); }

 private:
  std::string operation_;
};

// Throws SystemError(operation, errno).
[[noreturn]] inline void throw_errno(const char* operation) { throw SystemError(operation, errno); }

}  // namespace memferry
