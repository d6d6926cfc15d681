// The link rate: what one raw TCP stream delivers between two network namespaces, by the sender's clock from
// its first byte until the receiver has said that it read the last one.
//
// The server prints {"port":N} and reads one stream:
//   link_floor --role server --host ADDRESS [--cc NAME]
//   link_floor --role client --host ADDRESS --port N --bytes N [--cc NAME]
#include "floor.h"

enum { kChunkBytes = 256 * 1024 };

int main(int argc, char **argv) {
  const char *host = option(argc, argv, "--host", "127.0.0.1");
  const char *cc = option(argc, argv, "--cc", NULL);
  const uint64_t bytes = option_number(argc, argv, "--bytes", 256u << 20);
  uint16_t port = (uint16_t)option_number(argc, argv, "--port", 0);
  char *chunk = map_fresh(kChunkBytes);
  fill_random(chunk, kChunkBytes, 1);

  if (strcmp(option(argc, argv, "--role", "client"), "server") == 0) {
    int listener = listen_on(host, port, &port);
    printf("{\"port\":%u}\n", port);
    fflush(stdout);
    int fd = accept_one(listener, cc);
    uint64_t length;
    if (!read_all(fd, &length, sizeof length)) return 1;
    while (length > 0) {
      ssize_t n = recv(fd, chunk, length < kChunkBytes ? length : kChunkBytes, 0);
      if (n <= 0) die("recv");
      length -= (uint64_t)n;
    }
    write_all(fd, "d", 1);
    return 0;
  }

  int fd = dial(host, port, cc);
  const uint64_t start = now_ns();
  write_all(fd, &bytes, sizeof bytes);
  for (uint64_t left = bytes; left > 0;) {
    uint64_t length = left < kChunkBytes ? left : kChunkBytes;
    write_all(fd, chunk, length);
    left -= length;
  }
  char done;
  if (!read_all(fd, &done, 1)) die("receiver");
  const double seconds = (double)(now_ns() - start) / 1e9;
  printf("{\"seconds\":%.6f,\"bytesPerSecond\":%.0f}\n", seconds, (double)bytes / seconds);
  return 0;
}
