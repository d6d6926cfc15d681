// Milliseconds of a clock that never goes back, for ages.
#pragma once

#include <chrono>
#include <cstdint>

namespace memferry {

[[nodiscard]] inline std::uint64_t steady_ms() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::milliseconds>(now).count());
}

}  // namespace memferry
