// Floor of `bulk` and `scatter`: one copy of a region's worth of random bytes from one process to another, or to
// several, over loopback TCP, on 1 or more connections, contiguous shares. With --hash one XXH3 over each 256 KiB
// chunk on either side, compared. The clock is the sender's: from the word "go" until every connection's receiver
// has said that its share is in memory; with --memory fresh a receiver maps its memory only after "go", with --memory
// huge it asks for huge pages as well.
//
//   bulk_floor --bytes N --channels N [--receivers N] --memory touched|fresh|huge [--hash] [--cc NAME]
#include <pthread.h>
#include <sys/mman.h>
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

struct copy {
  uint64_t bytes;
  uint64_t channels;
  uint64_t each;  // of a channel; the last one also has what is left over
  bool fresh;
  bool huge;
  bool hash;
  const char *cc;
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
                       const struct copy *copy) {
  struct share shares[kMaxChannels];
  pthread_t threads[kMaxChannels];
  for (uint64_t i = 0; i < channels; i++) {
    const uint64_t at = i * copy->each;
    shares[i] = (struct share){fds[i], memory + at, i + 1 == channels ? bytes - at : copy->each, copy->hash};
    if (pthread_create(&threads[i], NULL, body, &shares[i]) != 0) die("pthread_create");
  }
  for (uint64_t i = 0; i < channels; i++) pthread_join(threads[i], NULL);
}

// Of `copy`, what comes on `channels` of its connections.
static _Noreturn void receive(int listener, uint64_t channels, uint64_t bytes, const struct copy *copy) {
  char *memory = NULL;
  if (!copy->fresh) {
    memory = map_fresh(bytes);
    touch(memory, bytes);
  }
  int fds[kMaxChannels];
  for (uint64_t i = 0; i < channels; i++) fds[i] = accept_one(listener, copy->cc);
  char filled;
  if (!read_all(fds[0], &filled, 1)) die("sender");
  if (copy->fresh) have_backed(bytes + bytes / 4);
  write_all(fds[0], "r", 1);
  char go;
  if (!read_all(fds[0], &go, 1)) die("sender");
  if (copy->fresh) memory = map_fresh(bytes);
  if (copy->huge) madvise(memory, bytes, MADV_HUGEPAGE);
  run_shares(receive_share, fds, channels, memory, bytes, copy);
  _exit(0);
}

int main(int argc, char **argv) {
  const char *kind = option(argc, argv, "--memory", "touched");
  struct copy copy = {
      .bytes = option_number(argc, argv, "--bytes", 1u << 30),
      .channels = option_number(argc, argv, "--channels", 1),
      .fresh = strcmp(kind, "touched") != 0,
      .huge = strcmp(kind, "huge") == 0,
      .hash = flag(argc, argv, "--hash"),
      .cc = option(argc, argv, "--cc", NULL),
  };
  const uint64_t receivers = option_number(argc, argv, "--receivers", 1);
  if (copy.channels < 1 || copy.channels > kMaxChannels) {
    fprintf(stderr, "--channels: 1 to %d\n", kMaxChannels);
    return 2;
  }
  if (receivers < 1 || copy.channels % receivers != 0) {
    fprintf(stderr, "--receivers: each takes as many of the channels\n");
    return 2;
  }
  copy.each = copy.bytes / copy.channels / kChunkBytes * kChunkBytes;
  const uint64_t channels = copy.channels / receivers;

  pid_t children[kMaxChannels];
  uint16_t ports[kMaxChannels];
  for (uint64_t i = 0; i < receivers; i++) {
    const int listener = listen_on("127.0.0.1", 0, &ports[i]);
    const uint64_t at = i * channels * copy.each;
    children[i] = fork();
    if (children[i] < 0) die("fork");
    if (children[i] == 0) {
      receive(listener, channels, i + 1 == receivers ? copy.bytes - at : channels * copy.each, &copy);
    }
    close(listener);
  }

  char *memory = map_fresh(copy.bytes);
  fill_random(memory, copy.bytes, 1);
  int fds[kMaxChannels];
  // A receiver's first connection, on which it is spoken to, must be the first that it accepts.
  for (uint64_t i = 0; i < copy.channels; i++) fds[i] = dial("127.0.0.1", ports[i / channels], copy.cc);
  for (uint64_t i = 0; i < copy.channels; i += channels) write_all(fds[i], "f", 1);
  for (uint64_t i = 0; i < copy.channels; i += channels) {
    char ready;
    if (!read_all(fds[i], &ready, 1)) die("receiver");
  }
  const uint64_t start = now_ns();
  for (uint64_t i = 0; i < copy.channels; i += channels) write_all(fds[i], "g", 1);
  run_shares(send_share, fds, copy.channels, memory, copy.bytes, &copy);
  const double seconds = (double)(now_ns() - start) / 1e9;
  for (uint64_t i = 0; i < receivers; i++) {
    int status;
    if (waitpid(children[i], &status, 0) < 0 || status != 0) {
      fprintf(stderr, "a receiver failed\n");
      return 1;
    }
  }
  printf("{\"seconds\":%.6f,\"gbPerSecond\":%.4f}\n", seconds, (double)copy.bytes / 1e9 / seconds);
  return 0;
}
