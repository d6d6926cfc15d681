// Floor of `restore`: the least page-fault handler that Firecracker can be given. It takes the one message of its
// protocol, and answers each fault with one page: read from the snapshot's file, or with --remote asked for in one
// blocking round trip over TCP from a process that holds it. What is measured is what the guest sees.
//
//   restore_floor --socket PATH --snapshot FILE [--remote]
//
// Prints {"listening":true} when it listens, serves one microVM and ends with it.
#include <sys/un.h>
#include <sys/wait.h>

#include "kernel.h"

struct mapping {
  uint64_t address;
  uint64_t bytes;
  uint64_t offset;
};

static int receive(int socket, struct mapping *mapping) {
  char text[65536];
  union {
    struct cmsghdr aligned;
    char bytes[CMSG_SPACE(4 * sizeof(int))];
  } control;
  struct iovec into = {.iov_base = text, .iov_len = sizeof text - 1};
  struct msghdr message = {
      .msg_iov = &into, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
  ssize_t n = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
  if (n <= 0) die("recvmsg");
  text[n] = 0;
  unsigned long long address, bytes, offset;
  if (sscanf(text, "[{\"base_host_virt_addr\":%llu,\"size\":%llu,\"offset\":%llu", &address, &bytes, &offset) != 3) {
    fprintf(stderr, "no mapping in %s\n", text);
    exit(1);
  }
  *mapping = (struct mapping){address, bytes, offset};
  struct cmsghdr *part = CMSG_FIRSTHDR(&message);
  if (part == NULL || part->cmsg_type != SCM_RIGHTS) die("no descriptor");
  int fd;
  memcpy(&fd, CMSG_DATA(part), sizeof fd);
  return fd;
}

// Pages by their offsets, until the client goes away.
static void serve_pages(int listener, int file) {
  const uint64_t page = page_size();
  char *content = aligned_alloc(page, page);
  int fd = accept_one(listener, NULL);
  uint64_t offset;
  while (read_all(fd, &offset, sizeof offset)) {
    if (pread(file, content, page, (off_t)offset) != (ssize_t)page) die("pread");
    write_all(fd, content, page);
  }
}

int main(int argc, char **argv) {
  const char *path = option(argc, argv, "--socket", NULL);
  const char *snapshot = option(argc, argv, "--snapshot", NULL);
  bool remote = false;
  for (int i = 1; i < argc; i++) remote = remote || strcmp(argv[i], "--remote") == 0;
  const uint64_t page = page_size();
  int file = open(snapshot, O_RDONLY | O_CLOEXEC);
  if (file < 0) die("open");
  int server = -1;
  pid_t child = 0;
  if (remote) {
    uint16_t port;
    int listener = listen_on("127.0.0.1", 0, &port);
    child = fork();
    if (child < 0) die("fork");
    if (child == 0) {
      serve_pages(listener, file);
      _exit(0);
    }
    server = dial("127.0.0.1", port, NULL);
  }
  int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  strncpy(address.sun_path, path, sizeof address.sun_path - 1);
  if (bind(listener, (struct sockaddr *)&address, sizeof address) != 0 || listen(listener, 1) != 0) die("listen");
  printf("{\"listening\":true}\n");
  fflush(stdout);
  int connection = accept(listener, NULL, NULL);
  if (connection < 0) die("accept");
  struct mapping mapping;
  int uffd = receive(connection, &mapping);
  if (fcntl(uffd, F_SETFL, 0) != 0) die("fcntl");
  char *content = aligned_alloc(page, page);
  for (;;) {
    struct uffd_msg event;
    ssize_t n = read(uffd, &event, sizeof event);
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (n != sizeof event) break;
    if (event.event != UFFD_EVENT_PAGEFAULT) continue;
    uint64_t at = event.arg.pagefault.address & ~(page - 1);
    uint64_t offset = at - mapping.address + mapping.offset;
    if (remote) {
      write_all(server, &offset, sizeof offset);
      if (!read_all(server, content, page)) die("server");
    } else if (pread(file, content, page, (off_t)offset) != (ssize_t)page) {
      die("pread");
    }
    struct uffdio_copy copy = {.dst = at, .src = (uintptr_t)content, .len = page};
    if (ioctl(uffd, UFFDIO_COPY, &copy) != 0) {
      if (errno == ESRCH) break;
      if (errno != EEXIST) die("UFFDIO_COPY");
    }
  }
  return 0;
}
