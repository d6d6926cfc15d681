#include "wire/link_meter.h"

// The kernel's own header: the C library's struct tcp_info ends before bytes_acked.
#include <linux/sockios.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

namespace memferry::wire {

std::optional<std::chrono::microseconds> shortest_round_trip(int connected_fd) {
  tcp_info info{};
  socklen_t bytes = sizeof info;
  if (::getsockopt(connected_fd, IPPROTO_TCP, TCP_INFO, &info, &bytes) != 0) return std::nullopt;
  return std::chrono::microseconds(info.tcpi_min_rtt);
}

std::optional<LinkMeter::Window> LinkMeter::sent(int fd, std::uint64_t raw_bytes, Clock::time_point now) {
  raw_ += raw_bytes;
  if (running_ && now - began_ < kWindow) return std::nullopt;
  tcp_info info{};
  socklen_t bytes = sizeof info;
  int unsent = 0;
  // Not TCP, or cut: nothing is known, and nothing compressed for its sake.
  const bool known =
      ::getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &bytes) == 0 && ::ioctl(fd, SIOCOUTQNSD, &unsent) == 0;
  std::optional<Window> window;
  if (running_ && known && info.tcpi_bytes_acked >= acknowledged_) {
    const double seconds = std::chrono::duration<double>(now - began_).count();
    window = Window{static_cast<double>(info.tcpi_bytes_acked - acknowledged_) / seconds,
                    static_cast<double>(raw_) / seconds, unsent > 0 || 2 * waited_ > now - began_};
  }
  running_ = known;
  began_ = now;
  acknowledged_ = info.tcpi_bytes_acked;
  waited_ = {};
  raw_ = 0;
  return window;
}

}  // namespace memferry::wire
