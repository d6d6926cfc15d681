// Floor of `fault` and `fault-lab`: a remote fault with nothing but what cannot be left out. The toucher
// reads a missing page; the handler thread reads the event, asks for the page in one blocking round trip over
// TCP and installs it. What is measured is what the toucher sees, from before its read until after it.
//
// Both sides over loopback:
//   fault_floor [--pages N] [--touches N] [--order random|sequential] [--cc NAME]
// For two network namespaces (the server prints {"port":N} and serves one client):
//   fault_floor --role server --host ADDRESS [--pages N]
//   fault_floor --role client --host ADDRESS --port N [...]
#include <pthread.h>
#include <sys/wait.h>

#include "kernel.h"

struct handler {
  int uffd;
  int socket;
  char *memory;
};

static _Noreturn void *handle(void *argument) {
  struct handler *handler = argument;
  const uint64_t page = page_size();
  char *content = aligned_alloc(page, page);
  if (content == NULL) die("aligned_alloc");
  for (;;) {
    struct uffd_msg event;
    ssize_t n = read(handler->uffd, &event, sizeof event);
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (n != sizeof event) die("read userfaultfd");
    if (event.event != UFFD_EVENT_PAGEFAULT) continue;
    uint64_t address = event.arg.pagefault.address & ~(page - 1);
    uint64_t number = (address - (uintptr_t)handler->memory) / page;
    write_all(handler->socket, &number, sizeof number);
    if (!read_all(handler->socket, content, page)) die("server");
    struct uffdio_copy copy = {.dst = address, .src = (uintptr_t)content, .len = page};
    if (ioctl(handler->uffd, UFFDIO_COPY, &copy) != 0) die("UFFDIO_COPY");
  }
}

// Serves pages of random bytes until the client goes away.
static void serve(int listener, uint64_t pages, const char *cc) {
  const uint64_t page = page_size();
  char *memory = map_fresh(pages * page);
  fill_random(memory, pages * page, 1);
  int fd = accept_one(listener, cc);
  write_all(fd, "r", 1);
  uint64_t number;
  while (read_all(fd, &number, sizeof number)) {
    if (number >= pages) {
      fprintf(stderr, "page %llu of %llu\n", (unsigned long long)number, (unsigned long long)pages);
      exit(1);
    }
    write_all(fd, memory + number * page, page);
  }
}

static void measure(int fd, uint64_t pages, uint64_t touches, bool sequential) {
  const uint64_t page = page_size();
  char ready;
  if (!read_all(fd, &ready, 1)) die("server");
  static struct handler handler;  // outlives this call, as the thread does
  handler = (struct handler){.socket = fd, .memory = map_fresh(pages * page)};
  handler.uffd = open_userfaultfd(0);
  register_range(handler.uffd, handler.memory, pages * page, UFFDIO_REGISTER_MODE_MISSING);
  pthread_t thread;
  if (pthread_create(&thread, NULL, handle, &handler) != 0) die("pthread_create");

  uint32_t *order = shuffled((uint32_t)pages, 2);
  double *latency_us = malloc(sizeof *latency_us * touches);
  if (latency_us == NULL) die("malloc");
  touch(latency_us, sizeof *latency_us * touches);
  const uint64_t begin = now_ns();
  for (uint64_t i = 0; i < touches; i++) {
    const volatile char *at = handler.memory + (sequential ? i : order[i]) * page;
    const uint64_t start = now_ns();
    (void)*at;
    latency_us[i] = (double)(now_ns() - start) / 1e3;
  }
  const double seconds = (double)(now_ns() - begin) / 1e9;
  qsort(latency_us, touches, sizeof *latency_us, by_value);
  printf("{\"count\":%llu,\"p50Us\":%.3f,\"p99Us\":%.3f,\"maxUs\":%.3f,\"pagesPerSecond\":%.1f}\n",
         (unsigned long long)touches, quantile(latency_us, touches, 0.5), quantile(latency_us, touches, 0.99),
         latency_us[touches - 1], (double)touches / seconds);
}

int main(int argc, char **argv) {
  const char *role = option(argc, argv, "--role", "both");
  const char *host = option(argc, argv, "--host", "127.0.0.1");
  const char *cc = option(argc, argv, "--cc", NULL);
  const uint64_t pages = option_number(argc, argv, "--pages", 65536);
  const uint64_t touches = option_number(argc, argv, "--touches", 20000);
  const bool sequential = strcmp(option(argc, argv, "--order", "random"), "sequential") == 0;
  if (touches > pages || pages > UINT32_MAX) {
    fprintf(stderr, "--touches: at most --pages\n");
    return 2;
  }

  if (strcmp(role, "client") == 0) {
    measure(dial(host, (uint16_t)option_number(argc, argv, "--port", 0), cc), pages, touches, sequential);
    return 0;
  }
  uint16_t port;
  int listener = listen_on(host, (uint16_t)option_number(argc, argv, "--port", 0), &port);
  if (strcmp(role, "server") == 0) {
    printf("{\"port\":%u}\n", port);
    fflush(stdout);
    serve(listener, pages, cc);
    return 0;
  }
  pid_t server = fork();
  if (server < 0) die("fork");
  if (server == 0) {
    serve(listener, pages, cc);
    _exit(0);
  }
  int fd = dial(host, port, cc);
  measure(fd, pages, touches, sequential);
  // The server ends at the end of its input; the handler, which holds no lock, ends with the process.
  shutdown(fd, SHUT_RDWR);
  int status;
  if (waitpid(server, &status, 0) < 0 || status != 0) return 1;
  return 0;
}
