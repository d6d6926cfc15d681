// Floor of `track`, and of `downtime`'s final scan: the bare PAGEMAP_SCAN that finds the written pages of a
// region and protects them again, with a vector that holds them all.
//
//   scan_floor [--bytes N] --dirty N|all [--scans N]   N pages, scattered, written before each scan
//   scan_floor [--bytes N] --writer tracked|free       what one write to each page costs its writer
#include "kernel.h"

static void write_pages(char *memory, const uint32_t *order, uint64_t count) {
  const uint64_t page = page_size();
  for (uint64_t i = 0; i < count; i++) {
    volatile uint64_t *word = (volatile uint64_t *)(memory + (order != NULL ? order[i] : i) * page);
    *word = *word + 1;
  }
}

int main(int argc, char **argv) {
  const uint64_t page = page_size();
  const uint64_t bytes = option_number(argc, argv, "--bytes", 1u << 30);
  const uint64_t pages = bytes / page;
  const uint64_t scans = option_number(argc, argv, "--scans", 5);
  const char *writer = option(argc, argv, "--writer", NULL);
  const bool all = strcmp(option(argc, argv, "--dirty", "0"), "all") == 0;
  const uint64_t dirty = all ? pages : option_number(argc, argv, "--dirty", 0);
  if (dirty > pages || scans < 1 || pages > UINT32_MAX) {
    fprintf(stderr, "--dirty: at most the region's pages; --scans: at least 1\n");
    return 2;
  }

  char *memory = map_fresh(bytes);
  touch(memory, bytes);
  double *samples = calloc(scans, sizeof *samples);
  struct page_region *found = map_fresh((pages + 1) * sizeof *found);
  touch(found, (pages + 1) * sizeof *found);
  if (samples == NULL) die("calloc");
  const bool tracked = writer == NULL || strcmp(writer, "tracked") == 0;
  int pagemap = open_pagemap();
  if (tracked) {
    int uffd = open_userfaultfd(UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED |
                                UFFD_FEATURE_PAGEFAULT_FLAG_WP);
    register_range(uffd, memory, bytes, UFFDIO_REGISTER_MODE_WP);
    protect_range(uffd, memory, bytes);
  }
  // Another order in every scan, so that the runs do not stay in the caches.
  uint64_t scanned = 0;
  for (uint64_t i = 0; i < scans; i++) {
    if (writer != NULL) {
      const uint64_t start = now_ns();
      write_pages(memory, NULL, pages);
      samples[i] = (double)(now_ns() - start) / (double)pages;
      if (tracked) scanned = scan_and_rearm(pagemap, memory, bytes, found, pages + 1);
      continue;
    }
    uint32_t *order = all ? NULL : shuffled((uint32_t)pages, 7 + i);
    write_pages(memory, order, dirty);
    free(order);
    const uint64_t start = now_ns();
    scanned = scan_and_rearm(pagemap, memory, bytes, found, pages + 1);
    samples[i] = (double)(now_ns() - start) / 1e6;
    if (scanned != dirty) {
      fprintf(stderr, "wrote %llu pages, the scan found %llu\n", (unsigned long long)dirty,
              (unsigned long long)scanned);
      return 1;
    }
  }
  printf("{\"%s\":[", writer != NULL ? "nsPerPage" : "scanMs");
  for (uint64_t i = 0; i < scans; i++) printf("%s%.4f", i == 0 ? "" : ",", samples[i]);
  printf("],\"pages\":%llu}\n", (unsigned long long)scanned);
  return 0;
}
