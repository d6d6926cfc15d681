// C++ exceptions as JavaScript errors with `code`, `errno` and `syscall`, the one way out of every function
// of the addon. TypeScript turns the codes into its classes (src/errors.ts).
//
// Thread: an environment's own.
#pragma once

#include <exception>
#include <stdexcept>
#include <string>
#include <utility>

#include "bind/node_api.h"

namespace memferry::bind {

// A failure with a code of its own.
class CodedError : public std::runtime_error {
 public:
  CodedError(std::string code, const std::string& message)
      : std::runtime_error(message), code_(std::move(code)) {}
  [[nodiscard]] const std::string& code() const { return code_; }

 private:
  std::string code_;
};

[[nodiscard]] Napi::Error to_js_error(Napi::Env env, const std::exception_ptr& exception);

// Runs a function of the addon; what it throws is thrown in JavaScript.
template <typename Function>
auto guarded(Napi::Env env, Function&& function) -> decltype(function()) {
  try {
    return function();
  } catch (const Napi::Error&) {
    throw;
  } catch (...) {
    throw to_js_error(env, std::current_exception());
  }
}

}  // namespace memferry::bind
