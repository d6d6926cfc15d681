// A process that owns memory and a userfaultfd for it: memory_owner BYTES. Prints {"pid", "address", "uffd"}, then writes
// one word to each of COUNT pages, scattered by SEED (all of them in order when COUNT is that many), for each line
// "COUNT SEED", and answers "done".
#include <inttypes.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernel.h"

int main(int argc, char** argv) {
  const uint64_t bytes = argc > 1 ? strtoull(argv[1], NULL, 10) : 0;
  const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
  const uint64_t pages = bytes / page;
  if (pages == 0) return 2;
  volatile char* const memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return 3;
  for (uint64_t at = 0; at < bytes; at += page) memory[at] = 1;
  const int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
  struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED};
  if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) != 0) return 4;
  printf("{\"pid\":%d,\"address\":\"%" PRIuPTR "\",\"uffd\":%d}\n", (int)getpid(), (uintptr_t)memory, uffd);
  fflush(stdout);
  uint64_t count = 0;
  uint64_t seed = 0;
  for (char line[128]; fgets(line, sizeof line, stdin) != NULL;) {
    if (sscanf(line, "%" SCNu64 " %" SCNu64, &count, &seed) != 2) return 5;
    // An odd step visits different pages where their number is a power of two.
    const uint64_t step = count == pages ? 1 : (seed * 2654435761u) | 1;
    for (uint64_t i = 0; i < count; i++) memory[(seed + i * step) % pages * page]++;
    puts("done");
    fflush(stdout);
  }
  return 0;
}
