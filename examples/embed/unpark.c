/*
 * Has a parked guest back from the VMD: claims it by its ticket, lets it run while its pages come, and writes its memory.
 *   MEMFERRY_SECRET=... unpark TICKET-FILE [OUTPUT-DIRECTORY]
 */
#include <memferry.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_REGIONS = 64 };

static struct memferry_error error = {.size = sizeof error};

static void must(int code, const char* what) {
  if (code == MEMFERRY_OK) return;
  fprintf(stderr, "%s: %s: %s\n", what, memferry_code_name(code), error.text);
  exit(1);
}

int main(int argc, char** argv) {
  static char ticket[65536];
  const char* secret = getenv("MEMFERRY_SECRET");
  FILE* file = argc > 1 ? fopen(argv[1], "r") : NULL;
  if (!file || !secret || fread(ticket, 1, sizeof ticket - 1, file) == 0) {
    fprintf(stderr, "unpark: a file with a ticket, and MEMFERRY_SECRET\n");
    return 2;
  }
  fclose(file);
  const struct memferry_vmd_options options = {
      .size = sizeof options, .secret = secret, .secret_bytes = strlen(secret), .in_doubt_timeout_ms = 5000};
  memferry_image* image;
  must(memferry_image_claim(&options, ticket, &image, &error), "claim");

  memferry_region* regions[MOST_REGIONS];
  const size_t count = memferry_image_region_count(image);
  for (size_t i = 0; i < count; i++) {
    struct memferry_offered_region region;
    must(memferry_image_region(image, i, &region, &error), "region");
    must(memferry_region_allocate(region.length_bytes, &regions[i], &error), "allocate");
  }
  must(memferry_image_serve(image, regions, count, NULL, NULL, &error), "serve");
  /* What a guest's start would do: its state, and a page of its memory, which comes from a server now. */
  size_t state_bytes;
  (void)memferry_image_state(image, &state_bytes);
  const volatile unsigned char* page = memferry_region_page(regions[0], 0);
  const unsigned first = page[0];
  must(memferry_image_grant(image, &error), "grant");
  printf("'%s' runs here: %zu bytes of state, its memory begins with %u\n", memferry_image_guest(image),
         state_bytes, first);
  fflush(stdout);

  must(memferry_image_wait(image, 60000, &error), "wait");
  struct memferry_receiver_stats stats = {.size = sizeof stats};
  must(memferry_image_get_stats(image, &stats, &error), "stats");
  printf("every page is here, %llu by demand\n", (unsigned long long)stats.remote_faults);
  must(memferry_image_close(image, &error), "close");
  for (size_t i = 0; i < count; i++) {
    if (argc > 2) {
      char path[4096];
      snprintf(path, sizeof path, "%s/%zu", argv[2], i);
      file = fopen(path, "w");
      if (!file ||
          fwrite(memferry_region_page(regions[i], 0), memferry_region_bytes(regions[i]), 1, file) != 1)
        return 1;
      fclose(file);
    }
    must(memferry_region_close(regions[i], &error), "close");
  }
  return 0;
}
