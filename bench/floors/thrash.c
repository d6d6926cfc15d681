// No floor: a busy neighbour for lab/pressure.ts. Writes to pages of its memory in random order, for ever, so that
// the memory cgroup that it shares has to swap. Half of each page compresses, as an application's data would.
//
//   thrash --bytes N [--pages-per-second N]
// Prints {"ready":true} when it holds all its memory. Ends with the process that started it.
#include <signal.h>
#include <sys/prctl.h>

#include "floor.h"

int main(int argc, char **argv) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  const uint64_t bytes = option_number(argc, argv, "--bytes", 64u << 20);
  const uint64_t rate = option_number(argc, argv, "--pages-per-second", 5000);
  const uint64_t page = page_size();
  const uint64_t pages = bytes / page;
  if (pages == 0 || rate == 0) {
    fprintf(stderr, "nothing to do\n");
    return 2;
  }
  char *memory = map_fresh(bytes);
  for (uint64_t i = 0; i < pages; i++) {
    fill_random(memory + i * page, page / 2, i);
    memset(memory + i * page + page / 2, (int)(i & 0xff), page / 2);
  }
  printf("{\"ready\":true}\n");
  fflush(stdout);
  // What it is late with it does not catch up on: how much it wants must not depend on how little it gets.
  const uint64_t batch = rate < 1000 ? 1 : rate / 1000;
  const struct timespec pause = {.tv_nsec = (long)(batch * 1000000000u / rate)};
  uint64_t seed = 1;
  for (;;) {
    for (uint64_t i = 0; i < batch; i++) {
      volatile uint64_t *word = (uint64_t *)(memory + next_random(&seed) % pages * page);
      *word = *word + 1;
    }
    nanosleep(&pause, NULL);
  }
}
