// How fast a host under memory pressure takes memory in: one raw TCP stream received into fresh memory, all of
// which stays mapped. The other end is link_floor's client, and its clock counts: from the first byte sent until
// the last one lies in memory. Start it inside the memory cgroup.
//
// It prints {"port":N}, serves one stream, and prints {"seconds":S,"megabytesPerSecond":R}:
//   pressure_floor --host ADDRESS [--cc NAME] [--ballast BYTES]
// The ballast is memory touched before and never again: what a real receiver holds besides the guest.
#include "floor.h"

// A socket's worth; the pages of a piece are touched by the kernel's copy and by nobody else.
enum { kPieceBytes = 256 * 1024 };

int main(int argc, char **argv) {
  const char *host = option(argc, argv, "--host", "127.0.0.1");
  const char *cc = option(argc, argv, "--cc", NULL);
  const uint64_t ballast = option_number(argc, argv, "--ballast", 0);
  if (ballast > 0) fill_random(map_fresh(ballast), ballast, 2);
  uint16_t port = 0;
  int listener = listen_on(host, port, &port);
  printf("{\"port\":%u}\n", port);
  fflush(stdout);
  int fd = accept_one(listener, cc);
  uint64_t length;
  if (!read_all(fd, &length, sizeof length)) return 1;
  char *memory = map_fresh(length);
  const uint64_t start = now_ns();
  for (uint64_t at = 0; at < length;) {
    const uint64_t left = length - at;
    ssize_t n = recv(fd, memory + at, left < kPieceBytes ? left : kPieceBytes, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) die("recv");
    at += (uint64_t)n;
  }
  const double seconds = (double)(now_ns() - start) / 1e9;
  write_all(fd, "d", 1);
  printf("{\"seconds\":%.6f,\"megabytesPerSecond\":%.2f}\n", seconds, (double)length / 1e6 / seconds);
  return 0;
}
