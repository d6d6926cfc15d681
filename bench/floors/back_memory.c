// Not a floor: what trials of fresh memory run before their clock starts (floor.h, have_backed()).
//   back_memory --bytes N
#include "floor.h"

int main(int argc, char **argv) {
  const uint64_t bytes = option_number(argc, argv, "--bytes", 1u << 30);
  const uint64_t start = now_ns();
  have_backed(bytes);
  printf("{\"seconds\":%.6f}\n", (double)(now_ns() - start) / 1e9);
  return 0;
}
