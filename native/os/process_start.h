// When a process was started: tells a process from a later one with the same pid.
//
// Threads: any.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>

namespace memferry {

// In clock ticks since the system was started (/proc/PID/stat); nothing when there is no such process.
[[nodiscard]] std::optional<std::uint64_t> process_start_ticks(pid_t pid);
// Now, on the same scale.
[[nodiscard]] std::uint64_t boot_ticks_now();

}  // namespace memferry
