// Floor of `hash`: libxxhash's XXH3 over 4 KiB pages in a bare loop, every variant in turn, the fastest wins.
//
//   hash_floor [--bytes N] [--page-bytes N] [--passes N]
#include "floor.h"
#include "hash.h"

int main(int argc, char **argv) {
  const uint64_t bytes = option_number(argc, argv, "--bytes", 256u << 20);
  const uint64_t page_bytes = option_number(argc, argv, "--page-bytes", 4096);
  const uint64_t passes = option_number(argc, argv, "--passes", 3);
  char *memory = map_fresh(bytes);
  fill_random(memory, bytes, 1);
  const uint64_t pages = bytes / page_bytes;
  uint64_t *out = map_fresh(pages * sizeof *out + page_size());
  touch(out, pages * sizeof *out);

  struct {
    const char *name;
    hash_loop *loop;
    double best;
  } variants[] = {
    {"baseline", loop_baseline, 0},
#if defined(__x86_64__)
    {"dispatch", loop_dispatch, 0},
    {"avx2", __builtin_cpu_supports("avx2") ? loop_avx2 : loop_baseline, 0},
#endif
  };
  const size_t count = sizeof variants / sizeof variants[0];
  size_t winner = 0;
  for (uint64_t pass = 0; pass < passes; pass++) {
    for (size_t v = 0; v < count; v++) {
      const uint64_t start = now_ns();
      variants[v].loop(memory, pages, page_bytes, out);
      const double rate = (double)bytes / (double)(now_ns() - start);
      if (rate > variants[v].best) variants[v].best = rate;
      if (variants[v].best > variants[winner].best) winner = v;
    }
  }
  uint64_t sum = 0;
  for (uint64_t i = 0; i < pages; i++) sum ^= out[i];
  printf("{\"variant\":\"%s\",\"gbPerSecond\":%.4f,\"sum\":\"%016llx\"}\n", variants[winner].name,
         variants[winner].best, (unsigned long long)sum);
  return 0;
}
