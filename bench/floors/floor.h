// What every floor needs: a clock, options, whole reads and writes, percentiles. A floor is the least C code
// that does the same work as a trial; it prints one JSON object and exits.
#pragma once

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define UNUSED __attribute__((unused))

static UNUSED _Noreturn void die(const char *operation) {
  fprintf(stderr, "%s: %s\n", operation, strerror(errno));
  exit(1);
}

// CLOCK_MONOTONIC is one clock for every process of a machine, network namespaces included.
static UNUSED uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static UNUSED const char *option(int argc, char **argv, const char *name, const char *fallback) {
  for (int i = 1; i + 1 < argc; i++) {
    if (strcmp(argv[i], name) == 0) return argv[i + 1];
  }
  return fallback;
}

static UNUSED uint64_t option_number(int argc, char **argv, const char *name, uint64_t fallback) {
  const char *text = option(argc, argv, name, NULL);
  if (text == NULL) return fallback;
  char *end = NULL;
  errno = 0;
  uint64_t value = strtoull(text, &end, 10);
  if (errno != 0 || end == text || *end != '\0') {
    fprintf(stderr, "%s: not a number: %s\n", name, text);
    exit(2);
  }
  return value;
}

static UNUSED bool flag(int argc, char **argv, const char *name) {
  for (int i = 1; i < argc; i++) {
    if (strcmp(argv[i], name) == 0) return true;
  }
  return false;
}

static UNUSED uint64_t page_size(void) { return (uint64_t)sysconf(_SC_PAGESIZE); }

static UNUSED void write_all(int fd, const void *bytes, size_t length) {
  const char *next = bytes;
  while (length > 0) {
    ssize_t n = send(fd, next, length, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) die("send");
    next += n;
    length -= (size_t)n;
  }
}

// False at a clean end before the first byte.
static UNUSED bool read_all(int fd, void *bytes, size_t length) {
  char *next = bytes;
  size_t left = length;
  while (left > 0) {
    ssize_t n = recv(fd, next, left, MSG_WAITALL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) die("recv");
    if (n == 0) {
      if (left == length) return false;
      fprintf(stderr, "the peer went away in the middle\n");
      exit(1);
    }
    next += n;
    left -= (size_t)n;
  }
  return true;
}

static UNUSED struct sockaddr_in address_of(const char *host, uint16_t port) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
  if (inet_pton(AF_INET, host, &address.sin_addr) != 1) {
    fprintf(stderr, "not an IPv4 address: %s\n", host);
    exit(2);
  }
  return address;
}

// `cc` NULL or "": the system's default.
static UNUSED void tune(int fd, const char *cc) {
  int one = 1;
  if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) != 0) die("TCP_NODELAY");
  if (cc != NULL && cc[0] != '\0' &&
      setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, cc, (socklen_t)strlen(cc)) != 0) {
    die("TCP_CONGESTION");
  }
}

// Prints {"port":N} so that whoever started the server knows where it listens.
static UNUSED int listen_on(const char *host, uint16_t port, uint16_t *bound) {
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) die("socket");
  int one = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  struct sockaddr_in address = address_of(host, port);
  if (bind(fd, (struct sockaddr *)&address, sizeof address) != 0) die("bind");
  if (listen(fd, 16) != 0) die("listen");
  socklen_t length = sizeof address;
  if (getsockname(fd, (struct sockaddr *)&address, &length) != 0) die("getsockname");
  *bound = ntohs(address.sin_port);
  return fd;
}

static UNUSED int accept_one(int listener, const char *cc) {
  int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
  if (fd < 0) die("accept");
  tune(fd, cc);
  return fd;
}

static UNUSED int dial(const char *host, uint16_t port, const char *cc) {
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) die("socket");
  tune(fd, cc);
  struct sockaddr_in address = address_of(host, port);
  if (connect(fd, (struct sockaddr *)&address, sizeof address) != 0) die("connect");
  return fd;
}

// splitmix64: fixed seed, the same bytes in every run.
static UNUSED uint64_t next_random(uint64_t *state) {
  uint64_t z = (*state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

static UNUSED void fill_random(void *memory, uint64_t bytes, uint64_t seed) {
  uint64_t *words = memory;
  for (uint64_t i = 0; i < bytes / sizeof *words; i++) words[i] = next_random(&seed);
}

// A permutation of 0 .. count-1.
static UNUSED uint32_t *shuffled(uint32_t count, uint64_t seed) {
  uint32_t *order = malloc(sizeof *order * count);
  if (order == NULL) die("malloc");
  for (uint32_t i = 0; i < count; i++) order[i] = i;
  for (uint32_t i = count; i > 1; i--) {
    uint32_t j = (uint32_t)(next_random(&seed) % i);
    uint32_t keep = order[i - 1];
    order[i - 1] = order[j];
    order[j] = keep;
  }
  return order;
}

static UNUSED void *map_fresh(uint64_t bytes) {
  void *memory =
      mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) die("mmap");
  return memory;
}

static UNUSED void touch(void *memory, uint64_t bytes) {
  const uint64_t page = page_size();
  for (uint64_t at = 0; at < bytes; at += page) ((volatile char *)memory)[at] = 1;
}

// A hypervisor may back a guest's memory only when it is first touched, and take it back once it has been free
// for some seconds: a first touch then costs ten times what it costs on real memory, and says nothing of the
// program that touches. What was touched and freed a moment ago is backed.
static UNUSED void have_backed(uint64_t bytes) {
  void *memory = map_fresh(bytes);
  touch(memory, bytes);
  munmap(memory, bytes);
}

static UNUSED int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

// Of a sorted array.
static UNUSED double quantile(const double *sorted, size_t count, double q) {
  if (count == 0) return 0;
  size_t index = (size_t)((double)count * q);
  return sorted[index < count ? index : count - 1];
}
