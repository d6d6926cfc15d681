// A process that owns memory and a userfaultfd for it, and does what lines on its standard input tell it; each is
// answered by one line. Built by the tests that need it.
//   memory-owner PAGES shared|huge|private FEATURES(hex)
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/memfd.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

static const uint64_t page = 4096;
static uint64_t pages;
static unsigned char* memory;
static atomic_int running;
static atomic_ullong writes;
static pthread_t writer;

static uint64_t next(uint64_t* state) {
  *state ^= *state << 13;
  *state ^= *state >> 7;
  *state ^= *state << 17;
  return *state;
}

// Writes to random places, a page at a time as far as a tracker is concerned; some of them often.
static void* write_on(void* seed) {
  uint64_t state = (uint64_t)(uintptr_t)seed | 1;
  while (atomic_load(&running)) {
    for (int i = 0; i < 32; i++) {
      const uint64_t hot = next(&state) % 4 != 0 ? pages / 8 + 1 : pages;
      const uint64_t at = (next(&state) % hot) * page + (next(&state) % (page / 8)) * 8;
      const uint64_t value = next(&state);
      memcpy(memory + at, &value, sizeof value);
      atomic_fetch_add(&writes, 1);
    }
    usleep(500);
  }
  return NULL;
}

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  setvbuf(stdout, NULL, _IOLBF, 0);
  pages = strtoull(argv[1], NULL, 10);
  const int huge = strcmp(argv[2], "huge") == 0;  // a memfd too, of reserved pages of 2 MiB
  const int shared = huge || strcmp(argv[2], "shared") == 0;
  const uint64_t features = strtoull(argv[3], NULL, 16);
  int memfd = -1;
  if (shared) {
    memfd = memfd_create("guest", MFD_CLOEXEC | (huge ? MFD_HUGETLB | MFD_HUGE_2MB : 0));
    if (memfd < 0 || ftruncate(memfd, (off_t)(pages * page)) != 0) return 3;
  }
  memory = mmap(NULL, pages * page, PROT_READ | PROT_WRITE,
                shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS, memfd, 0);
  if (memory == MAP_FAILED) return 4;
  const int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
  if (uffd < 0) return 5;
  struct uffdio_api api = {.api = UFFD_API, .features = features};
  if (argv[3][0] != '-' && ioctl(uffd, UFFDIO_API, &api) != 0) return 6;
  printf("%d %" PRIuPTR " %d %d\n", (int)getpid(), (uintptr_t)memory, uffd, memfd);

  char line[4096];
  while (fgets(line, sizeof line, stdin) != NULL) {
    char word[16] = "";
    char path[2048] = "";
    uint64_t first = 0;
    uint64_t count = 0;
    if (sscanf(line, "%15s", word) != 1) continue;
    if (strcmp(word, "dump") == 0) {
      sscanf(line, "%*s %2047s", path);
    } else {
      sscanf(line, "%*s %" SCNu64 " %" SCNu64, &first, &count);
    }
    if (strcmp(word, "fill") == 0) {
      uint64_t state = first * 2654435761u + 1;
      for (uint64_t at = 0; at < count * page; at += 8) {
        const uint64_t value = next(&state);
        memcpy(memory + at, &value, sizeof value);
      }
      puts("filled");
    } else if (strcmp(word, "run") == 0) {
      atomic_store(&running, 1);
      pthread_create(&writer, NULL, write_on, (void*)(uintptr_t)first);
      puts("running");
    } else if (strcmp(word, "stop") == 0) {
      if (atomic_exchange(&running, 0)) pthread_join(writer, NULL);
      printf("%llu\n", (unsigned long long)atomic_load(&writes));
    } else if (strcmp(word, "dump") == 0) {
      const int file = open(path, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
      uint64_t done = 0;
      while (file >= 0 && done < pages * page) {
        // Touched by hand, so that a lost page is a signal and no short write.
        (void)*(volatile unsigned char*)(memory + done);
        const ssize_t wrote = write(file, memory + done, page);
        if (wrote <= 0) break;
        done += (uint64_t)wrote;
      }
      if (file >= 0) close(file);
      printf("%" PRIu64 "\n", done);
    } else if (strcmp(word, "read") == 0) {
      uint64_t value;
      memcpy(&value, memory + first * page, sizeof value);
      printf("%" PRIu64 "\n", value);
    } else if (strcmp(word, "discard") == 0) {
      const int status = madvise(memory + first * page, count * page, shared ? MADV_REMOVE : MADV_DONTNEED);
      printf("%d\n", status == 0 ? 0 : errno);
    } else if (strcmp(word, "unmap") == 0) {
      printf("%d\n", munmap(memory + first * page, count * page));
    } else if (strcmp(word, "exec") == 0) {
      execl("/bin/sleep", "sleep", "1000", (char*)NULL);
      return 7;
    } else {
      puts("what?");
    }
  }
  return 0;
}
