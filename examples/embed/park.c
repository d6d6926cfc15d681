/*
 * Parks a guest that stands at VMD servers: its memory is a file's, and whoever has the ticket has it back (unpark.c).
 *   MEMFERRY_SECRET=... park TICKET-FILE MEMORY-FILE HOST:PORT...
 */
#define _POSIX_C_SOURCE 200809L
#include <fcntl.h>
#include <memferry.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static struct memferry_error error = {.size = sizeof error};

static void must(int code, const char* what) {
  if (code == MEMFERRY_OK) return;
  fprintf(stderr, "%s: %s: %s\n", what, memferry_code_name(code), error.text);
  exit(1);
}

/* Whoever reads it can have the guest. */
static void keep(const char* path, const char* ticket) {
  const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  const size_t bytes = strlen(ticket);
  if (fd < 0 || write(fd, ticket, bytes) != (ssize_t)bytes || fsync(fd) != 0 || close(fd) != 0) {
    perror(path);
    exit(1);
  }
}

static memferry_region* memory_of(const char* path) {
  memferry_region* region;
  struct stat stat;
  FILE* file = fopen(path, "r");
  if (!file || fstat(fileno(file), &stat) != 0) {
    perror(path);
    exit(1);
  }
  must(memferry_region_allocate((uint64_t)stat.st_size, &region, &error), "allocate");
  if (fread(memferry_region_page(region, 0), 1, (size_t)stat.st_size, file) != (size_t)stat.st_size) exit(1);
  fclose(file);
  return region;
}

int main(int argc, char** argv) {
  const char* secret = getenv("MEMFERRY_SECRET");
  if (argc < 4 || !secret) {
    fprintf(stderr, "park: a file for the ticket, one with memory, servers, and MEMFERRY_SECRET\n");
    return 2;
  }
  /* What a hypervisor has of its guest once its CPUs stand. */
  const struct memferry_named_region memory = {.name = "memory", .region = memory_of(argv[2])};
  const char state[] = {'c', 'p', 'u', 's'};

  const struct memferry_park_options options = {.size = sizeof options,
                                                .secret = secret,
                                                .secret_bytes = strlen(secret),
                                                .servers = (const char* const*)&argv[3],
                                                .server_count = (size_t)(argc - 3),
                                                .guest = "sample"};
  memferry_park* park;
  must(memferry_park_create(&options, &memory, 1, state, sizeof state, &park, &error), "create");
  keep(argv[1], memferry_park_ticket(park));
  int code = memferry_park_evict(park, &error);
  /* It may be parked, or not: until home has said which, nobody may let it run. */
  for (int again = 0; code == MEMFERRY_MIGRATION_IN_DOUBT && again < 10; again++)
    code = memferry_park_evict(park, &error);
  must(code, "evict");
  struct memferry_park_stats stats = {.size = sizeof stats};
  must(memferry_park_get_stats(park, &stats, &error), "stats");
  printf("'%s' is parked after %.0f ms: %llu pages at %u servers\n", options.guest, stats.eviction_ms,
         (unsigned long long)(stats.pages_sent + stats.pages_zero), stats.servers);
  must(memferry_park_close(park, &error), "close");
  must(memferry_region_close(memory.region, &error), "close");
  return 0;
}
