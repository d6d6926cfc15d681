// What goes wrong with a peer or a guest, by a code of docs/protocol.md (PEER_LOST, PROTOCOL_ERROR, ...): those are what
// travels to the other side and what an embedder is told.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace memferry::control {

// Why a migration ended.
struct Cause {
  std::string code;
  std::string message;
  friend bool operator==(const Cause&, const Cause&) = default;
};

class Failure : public std::runtime_error {
 public:
  Failure(std::string code, const std::string& message)
      : std::runtime_error(message), code_(std::move(code)) {}
  explicit Failure(const Cause& cause) : Failure(cause.code, cause.message) {}
  [[nodiscard]] const std::string& code() const { return code_; }
  [[nodiscard]] Cause cause() const { return {code_, what()}; }

 private:
  std::string code_;
};

// What is being handled (call it in a catch block), as a cause: a Failure's own code, NO_MEMORY for std::bad_alloc, else
// `otherwise`.
[[nodiscard]] Cause cause_of_current(const char* otherwise);

// Whether the code is one of memferry's: a peer may say anything.
[[nodiscard]] bool known_code(const std::string& code);
// A peer's word for what went wrong there: an unknown code becomes PEER_LOST.
[[nodiscard]] Cause from_peer(std::string code, std::string message);

// What an engine says (EngineEvent::code), by the codes that everybody else is told.
[[nodiscard]] Cause engine_cause(const std::string& code, std::string message);

}  // namespace memferry::control
