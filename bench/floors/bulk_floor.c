// Floor of `bulk`: one copy of a region's worth of random bytes from one process to another over loopback
// TCP, on 1 or more connections, contiguous shares. With --hash one XXH3 over each 256 KiB chunk on either
// side, compared. The clock is the sender's: from the word "go" until every connection's receiver has
// said that its share is in memory; with --memory fresh the receiver maps its memory only after "go".
//
//   bulk_floor --bytes N --channels N --memory touched|fresh [--hash] [--cc NAME]
#include <pthread.h>
#include <sys/wait.h>

#include "floor.h"
#include "hash.h"

enum { kChunkBytes = 256 * 1024, kMaxChannels = 16 };

struct share {
  int fd;
  char *memory;
  uint64_t bytes;
  bool hash;
};

static void *send_share(void *argument) {
  struct share *share = argument;
  for (uint64_t at = 0; at < share->bytes; at += kChunkBytes) {
    uint64_t length = share->bytes - at < kChunkBytes ? share->bytes - at : kChunkBytes;
    if (share->hash) {
      uint64_t sum = fast_hash(share->memory + at, length);
      struct iovec parts[2] = {{&sum, sizeof sum}, {share->memory + at, length}};
      struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
      ssize_t n = sendmsg(share->fd, &message, MSG_NOSIGNAL);
      if (n < (ssize_t)sizeof sum) die("sendmsg");
      uint64_t sent = (uint64_t)n - sizeof sum;
      write_all(share->fd, share->memory + at + sent, length - sent);
    } else {
      write_all(share->fd, share->memory + at, length);
    }
  }
  char done;
  if (!read_all(share->fd, &done, 1)) die("receiver");
  return NULL;
}

static void *receive_share(void *argument) {
  struct share *share = argument;
  for (uint64_t at = 0; at < share->bytes; at += kChunkBytes) {
    uint64_t length = share->bytes - at < kChunkBytes ? share->bytes - at : kChunkBytes;
    if (share->hash) {
      uint64_t sum;
      struct iovec parts[2] = {{&sum, sizeof sum}, {share->memory + at, length}};
      struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
      ssize_t n = recvmsg(share->fd, &message, MSG_WAITALL);
      if (n != (ssize_t)(sizeof sum + length)) die("recvmsg");
      if (fast_hash(share->memory + at, length) != sum) {
        fprintf(stderr, "a chunk arrived with another hash\n");
        exit(1);
      }
    } else if (!read_all(share->fd, share->memory + at, length)) {
      die("sender");
    }
  }
  write_all(share->fd, "d", 1);
  return NULL;
}

static void run_shares(void *(*body)(void *), const int *fds, uint64_t channels, char *memory, uint64_t bytes,
                       bool hash) {
  struct share shares[kMaxChannels];
  pthread_t threads[kMaxChannels];
  uint64_t each = bytes / channels / kChunkBytes * kChunkBytes;
  for (uint64_t i = 0; i < channels; i++) {
    shares[i] = (struct share){fds[i], memory + i * each, i + 1 == channels ? bytes - i * each : each, hash};
    if (pthread_create(&threads[i], NULL, body, &shares[i]) != 0) die("pthread_create");
  }
  for (uint64_t i = 0; i < channels; i++) pthread_join(threads[i], NULL);
}

int main(int argc, char **argv) {
  const uint64_t bytes = option_number(argc, argv, "--bytes", 1u << 30);
  const uint64_t channels = option_number(argc, argv, "--channels", 1);
  const bool fresh = strcmp(option(argc, argv, "--memory", "touched"), "fresh") == 0;
  const bool hash = flag(argc, argv, "--hash");
  const char *cc = option(argc, argv, "--cc", NULL);
  if (channels < 1 || channels > kMaxChannels) {
    fprintf(stderr, "--channels: 1 to %d\n", kMaxChannels);
    return 2;
  }

  uint16_t port;
  int listener = listen_on("127.0.0.1", 0, &port);
  int fds[kMaxChannels];
  pid_t receiver = fork();
  if (receiver < 0) die("fork");
  if (receiver == 0) {
    char *memory = NULL;
    if (!fresh) {
      memory = map_fresh(bytes);
      touch(memory, bytes);
    }
    for (uint64_t i = 0; i < channels; i++) fds[i] = accept_one(listener, cc);
    char filled;
    if (!read_all(fds[0], &filled, 1)) die("sender");
    if (fresh) have_backed(bytes + bytes / 4);
    write_all(fds[0], "r", 1);
    char go;
    if (!read_all(fds[0], &go, 1)) die("sender");
    if (fresh) memory = map_fresh(bytes);
    run_shares(receive_share, fds, channels, memory, bytes, hash);
    _exit(0);
  }

  char *memory = map_fresh(bytes);
  fill_random(memory, bytes, 1);
  // Channel 0 must be the first to be accepted.
  for (uint64_t i = 0; i < channels; i++) fds[i] = dial("127.0.0.1", port, cc);
  write_all(fds[0], "f", 1);
  char ready;
  if (!read_all(fds[0], &ready, 1)) die("receiver");
  const uint64_t start = now_ns();
  write_all(fds[0], "g", 1);
  run_shares(send_share, fds, channels, memory, bytes, hash);
  const double seconds = (double)(now_ns() - start) / 1e9;
  int status;
  if (waitpid(receiver, &status, 0) < 0 || status != 0) {
    fprintf(stderr, "the receiver failed\n");
    return 1;
  }
  printf("{\"seconds\":%.6f,\"gbPerSecond\":%.4f}\n", seconds, (double)bytes / 1e9 / seconds);
  return 0;
}
