// Kernel interfaces newer than some systems' headers: userfaultfd's asynchronous write-protection and
// PAGEMAP_SCAN (both Linux 6.7). The ioctl number is checked against the kernel's documentation.
#pragma once

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

#include "floor.h"

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif

#ifndef PAGEMAP_SCAN
struct page_region {
  uint64_t start;
  uint64_t end;
  uint64_t categories;
};
struct pm_scan_arg {
  uint64_t size;
  uint64_t flags;
  uint64_t start;
  uint64_t end;
  uint64_t walk_end;
  uint64_t vec;
  uint64_t vec_len;
  uint64_t max_pages;
  uint64_t category_inverted;
  uint64_t category_mask;
  uint64_t category_anyof_mask;
  uint64_t return_mask;
};
#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)
#define PM_SCAN_WP_MATCHING (1 << 0)
#define PM_SCAN_CHECK_WPASYNC (1 << 1)
#define PAGE_IS_WRITTEN (1 << 1)
#endif
_Static_assert(PAGEMAP_SCAN == 0xc0606610u, "PAGEMAP_SCAN's number");

// The full userfaultfd where it is allowed, else the one for accesses from user mode: the floors touch
// memory from user mode only.
static UNUSED int open_userfaultfd(uint64_t features) {
  int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
  if (fd < 0) fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
  if (fd < 0) die("userfaultfd");
  struct uffdio_api api = {.api = UFFD_API, .features = features};
  if (ioctl(fd, UFFDIO_API, &api) != 0) die("UFFDIO_API");
  return fd;
}

static UNUSED void register_range(int fd, void *memory, uint64_t bytes, uint64_t mode) {
  struct uffdio_register r = {.range = {.start = (uintptr_t)memory, .len = bytes}, .mode = mode};
  if (ioctl(fd, UFFDIO_REGISTER, &r) != 0) die("UFFDIO_REGISTER");
}

// Every page of the range clean from now on, all by one ioctl.
static UNUSED void protect_range(int fd, void *memory, uint64_t bytes) {
  struct uffdio_writeprotect w = {.range = {.start = (uintptr_t)memory, .len = bytes},
                                  .mode = UFFDIO_WRITEPROTECT_MODE_WP};
  if (ioctl(fd, UFFDIO_WRITEPROTECT, &w) != 0) die("UFFDIO_WRITEPROTECT");
}

static UNUSED int open_pagemap(void) {
  int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (fd < 0) die("open /proc/self/pagemap");
  return fd;
}

// The written pages of the range, counted and protected again.
static UNUSED uint64_t scan_and_rearm(int pagemap, void *memory, uint64_t bytes, struct page_region *found,
                                      uint64_t capacity) {
  const uint64_t page = page_size();
  uint64_t written = 0;
  uint64_t at = (uintptr_t)memory;
  const uint64_t end = at + bytes;
  while (at < end) {
    struct pm_scan_arg scan = {.size = sizeof scan,
                               .flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
                               .start = at,
                               .end = end,
                               .vec = (uintptr_t)found,
                               .vec_len = capacity,
                               .category_mask = PAGE_IS_WRITTEN,
                               .return_mask = PAGE_IS_WRITTEN};
    long n = ioctl(pagemap, PAGEMAP_SCAN, &scan);
    if (n < 0) die("PAGEMAP_SCAN");
    for (long i = 0; i < n; i++) written += (found[i].end - found[i].start) / page;
    at = scan.walk_end;
  }
  return written;
}
