// The shared secret's file: read only where nobody else can have read or put it there. src/control/secret.ts in C++.
#pragma once

#include <string>

#include "control/crypto.h"

namespace memferry::control {

inline constexpr std::size_t kLeastSecretBytes = 16;

// White space at its end does not count. Throws Failure: AUTH_FAILED, saying what to do about it; INVALID_ARGUMENT, it is
// too short.
[[nodiscard]] Bytes read_secret_file(const std::string& path);

}  // namespace memferry::control
