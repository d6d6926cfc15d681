// When a thread that may take a share of one core may go on: as soon as what it has used in all would have been allowed
// by now. Time in which it had nothing to do is credited for a moment only.
//
// Pure.
#pragma once

#include <algorithm>
#include <cstdint>

namespace memferry {

class CpuShare {
 public:
  // Not used, and still allowed: so much CPU time at once.
  static constexpr std::uint64_t kCreditNs = 1'000'000;

  CpuShare(double share, std::uint64_t now_ns) : share_(share), free_at_ns_(static_cast<double>(now_ns)) {}

  // How long to wait after so much CPU time was used.
  [[nodiscard]] std::uint64_t wait_ns(std::uint64_t used_ns, std::uint64_t now_ns) {
    const auto now = static_cast<double>(now_ns);
    free_at_ns_ = std::max(free_at_ns_, now - static_cast<double>(kCreditNs) / share_);
    free_at_ns_ += static_cast<double>(used_ns) / share_;
    return free_at_ns_ <= now ? 0 : static_cast<std::uint64_t>(free_at_ns_ - now);
  }

 private:
  const double share_;
  double free_at_ns_;
};

}  // namespace memferry
