// Who may be spoken to, and what with: the same rules as the TypeScript side's.
#pragma once

#include <cstdint>
#include <string>

#include "control/crypto.h"

namespace memferry::capi {

// Exactly one of the two. Throws Failure, std::invalid_argument.
[[nodiscard]] control::Bytes secret_of(const void* secret, std::size_t bytes, const char* file);
// Throws Failure (PLAINTEXT_REQUIRED) unless the address is loopback, or plain text was asked for.
void check_address(const std::string& host, std::uint16_t port, bool plaintext);

}  // namespace memferry::capi
