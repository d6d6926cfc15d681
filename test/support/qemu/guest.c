/*
 * The first process of a guest that checks its own memory, on Debian's kernel, with nothing else in its initramfs.
 * It keeps files (by MD5) and a heap of its own whose every page is known from its number and its generation, and
 * writes a line on the serial port at each tick:
 *
 *   T COUNTER pages CHECKED files CHECKED bad FOUND
 *
 * A counter that repeats or jumps, a line that is cut, a sum that is wrong: the guest was not moved as it was.
 * What it does is said on the kernel's command line: fill_mb (heap), dirty_pages (rewritten at a tick), tick_ms.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define WORDS (PAGE / 8)
#define FILES 6
#define FILE_BYTES (192 * 1024)
#define CHECKED_PAGES 48

static uint64_t state = 0x9e3779b97f4a7c15u;

static uint64_t mix(uint64_t x) {
  x ^= x >> 30;
  x *= 0xbf58476d1ce4e5b9u;
  x ^= x >> 27;
  x *= 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

static uint64_t any(void) { return mix(state += 0x9e3779b97f4a7c15u); }

/* MD5 of whole blocks and a tail, after RFC 1321. */
static uint32_t sines[64];

static void md5_block(uint32_t sum[4], const uint8_t *block) {
  static const int turns[4][4] = {{7, 12, 17, 22}, {5, 9, 14, 20}, {4, 11, 16, 23}, {6, 10, 15, 21}};
  uint32_t word[16];
  memcpy(word, block, 64);
  uint32_t a = sum[0], b = sum[1], c = sum[2], d = sum[3];
  for (int i = 0; i < 64; i++) {
    uint32_t f;
    int at;
    if (i < 16) {
      f = (b & c) | (~b & d);
      at = i;
    } else if (i < 32) {
      f = (d & b) | (~d & c);
      at = (5 * i + 1) % 16;
    } else if (i < 48) {
      f = b ^ c ^ d;
      at = (3 * i + 5) % 16;
    } else {
      f = c ^ (b | ~d);
      at = (7 * i) % 16;
    }
    const uint32_t whole = a + f + sines[i] + word[at];
    const int turn = turns[i / 16][i % 4];
    a = d;
    d = c;
    c = b;
    b += (whole << turn) | (whole >> (32 - turn));
  }
  sum[0] += a;
  sum[1] += b;
  sum[2] += c;
  sum[3] += d;
}

static void md5(const uint8_t *bytes, size_t count, uint32_t sum[4]) {
  const uint32_t start[4] = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476};
  memcpy(sum, start, sizeof start);
  size_t at = 0;
  for (; at + 64 <= count; at += 64) md5_block(sum, bytes + at);
  uint8_t tail[128] = {0};
  const size_t rest = count - at;
  memcpy(tail, bytes + at, rest);
  tail[rest] = 0x80;
  const size_t end = rest < 56 ? 64 : 128;
  const uint64_t bits = (uint64_t)count * 8;
  memcpy(tail + end - 8, &bits, 8);
  for (size_t i = 0; i < end; i += 64) md5_block(sum, tail + i);
}

/* floor(2^32 * |sin(i + 1)|), without a math library: the series in range reduced arguments. */
static double sine(double x) {
  const double two_pi = 6.283185307179586476925;
  while (x > two_pi) x -= two_pi;
  double term = x, sum = x;
  for (int i = 1; i < 20; i++) {
    term *= -x * x / ((2 * i) * (2 * i + 1));
    sum += term;
  }
  return sum;
}

static void known_md5(void) {
  uint32_t sum[4];
  const uint8_t expected[16] = {0x90, 0x01, 0x50, 0x98, 0x3c, 0xd2, 0x4f, 0xb0,
                                0xd6, 0x96, 0x3f, 0x7d, 0x28, 0xe1, 0x7f, 0x72};
  md5((const uint8_t *)"abc", 3, sum);
  if (memcmp(sum, expected, 16) != 0) printf("BAD md5 itself\n");
}

static void write_page(uint64_t *page, uint64_t number, uint32_t generation) {
  const uint64_t seed = mix(number * 0x100000001u + generation);
  for (int i = 0; i < WORDS; i++) page[i] = seed + (uint64_t)i * 0x9e3779b97f4a7c15u;
}

static int right_page(const uint64_t *page, uint64_t number, uint32_t generation) {
  const uint64_t seed = mix(number * 0x100000001u + generation);
  for (int i = 0; i < WORDS; i++) {
    if (page[i] != seed + (uint64_t)i * 0x9e3779b97f4a7c15u) return 0;
  }
  return 1;
}

static uint8_t buffer[FILE_BYTES];
static uint32_t sums[FILES][4];

static void file_name(char *name, int number) { sprintf(name, "/file%d", number); }

static void write_file(int number) {
  char name[16];
  file_name(name, number);
  for (size_t i = 0; i < FILE_BYTES; i += 8) {
    const uint64_t value = any();
    memcpy(buffer + i, &value, 8);
  }
  md5(buffer, FILE_BYTES, sums[number]);
  const int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0600);
  if (fd < 0 || write(fd, buffer, FILE_BYTES) != FILE_BYTES) printf("BAD write\n");
  close(fd);
}

static int right_file(int number) {
  char name[16];
  uint32_t sum[4];
  file_name(name, number);
  const int fd = open(name, O_RDONLY);
  const int whole = fd >= 0 && read(fd, buffer, FILE_BYTES) == FILE_BYTES;
  close(fd);
  md5(buffer, FILE_BYTES, sum);
  return whole && memcmp(sum, sums[number], 16) == 0;
}

static uint64_t asked(const char *name, uint64_t otherwise) {
  const char *value = getenv(name);
  return value ? strtoull(value, NULL, 10) : otherwise;
}

int main(void) {
  for (int i = 0; i < 64; i++) {
    const double s = sine(i + 1.0);
    sines[i] = (uint32_t)((s < 0 ? -s : s) * 4294967296.0);
  }
  mkdir("/dev", 0700);
  mount("dev", "/dev", "devtmpfs", 0, NULL);
  const int serial = open("/dev/ttyS0", O_RDWR | O_NOCTTY);
  if (serial >= 0) {
    dup2(serial, 1);
    dup2(serial, 2);
  }
  setvbuf(stdout, NULL, _IOLBF, 256);
  known_md5();
  const uint64_t pages = asked("fill_mb", 16) * 256;
  const uint64_t dirty = asked("dirty_pages", 32);
  const uint64_t tick_ms = asked("tick_ms", 5);
  uint64_t *heap = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  uint32_t *generation = calloc(pages, sizeof *generation);
  if (heap == MAP_FAILED || !generation) {
    printf("BAD no memory\n");
    for (;;) pause();
  }
  for (uint64_t i = 0; i < pages; i++) write_page(heap + i * WORDS, i, 0);
  for (int i = 0; i < FILES; i++) write_file(i);

  uint64_t pages_checked = 0, files_checked = 0, bad = 0, sweep = 0;
  for (uint64_t counter = 0;; counter++) {
    for (uint64_t i = 0; i < dirty; i++) {
      const uint64_t number = any() % pages;
      write_page(heap + number * WORDS, number, ++generation[number]);
    }
    /* Half of them in turn, so that every page is looked at, half anywhere. */
    for (int i = 0; i < CHECKED_PAGES; i++) {
      const uint64_t number = i % 2 ? any() % pages : sweep++ % pages;
      if (!right_page(heap + number * WORDS, number, generation[number])) {
        bad++;
        printf("BAD page %llu\n", (unsigned long long)number);
      }
      pages_checked++;
    }
    const int file = (int)(counter % FILES);
    if (!right_file(file)) {
      bad++;
      printf("BAD file %d\n", file);
    }
    files_checked++;
    if (dirty > 0 && counter % 8 == 7) write_file((int)(any() % FILES));
    printf("T %llu pages %llu files %llu bad %llu\n", (unsigned long long)counter,
           (unsigned long long)pages_checked, (unsigned long long)files_checked, (unsigned long long)bad);
    const struct timespec tick = {(time_t)(tick_ms / 1000), (long)(tick_ms % 1000) * 1000000};
    nanosleep(&tick, NULL);
  }
}
