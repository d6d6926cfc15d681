#include "os/process_start.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <ctime>
#include <string>

#include "os/unique_fd.h"

namespace memferry {

namespace {

constexpr int kStartField = 22;  // of proc(5)'s stat, counted from 1
constexpr int kStateField = 3;   // the first one after the name

}  // namespace

std::optional<std::uint64_t> process_start_ticks(pid_t pid) {
  const UniqueFd fd(::open(("/proc/" + std::to_string(pid) + "/stat").c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return std::nullopt;
  std::array<char, 1024> text{};
  const ssize_t got = ::read(fd.get(), text.data(), text.size() - 1);
  if (got <= 0) return std::nullopt;
  const std::string line(text.data(), static_cast<std::size_t>(got));
  // The name is in parentheses and may hold anything, spaces and parentheses too.
  std::size_t at = line.rfind(')');
  for (int field = kStateField; at != std::string::npos && field <= kStartField; ++field)
    at = line.find(' ', at + 1);
  if (at == std::string::npos) return std::nullopt;
  return std::strtoull(line.c_str() + at, nullptr, 10);
}

std::uint64_t boot_ticks_now() {
  timespec now{};
  ::clock_gettime(CLOCK_BOOTTIME, &now);
  const auto hertz = static_cast<std::uint64_t>(::sysconf(_SC_CLK_TCK));
  return static_cast<std::uint64_t>(now.tv_sec) * hertz +
         static_cast<std::uint64_t>(now.tv_nsec) * hertz / 1'000'000'000U;
}

}  // namespace memferry
