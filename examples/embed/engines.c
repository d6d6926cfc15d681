/*
 * A sender and a receiver in one process, each over memory of its own: rounds while the "guest" writes, then post-copy.
 * What a hypervisor with a control connection of its own would do on two hosts.
 */
#define _GNU_SOURCE
#include <memferry.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

enum { PAGES = 4096, ROUND_MS = 20000 };

static struct memferry_error error = {.size = sizeof error};

static void must(int code, const char* what) {
  if (code == MEMFERRY_OK) return;
  fprintf(stderr, "%s: %s: %s\n", what, memferry_code_name(code), error.text);
  exit(1);
}

/* Every fourth page is written in round `version`. */
static void write_pages(memferry_region* region, unsigned version) {
  for (uint64_t page = version % 4; page < PAGES; page += 4)
    memset(memferry_region_page(region, page), (int)(1 + (page + version) % 250), memferry_page_size());
}

int main(void) {
  if (memferry_version() != MEMFERRY_VERSION) {
    fprintf(stderr, "built with another memferry.h\n");
    return 1;
  }
  const uint64_t bytes = PAGES * memferry_page_size();
  memferry_region *from, *to;
  must(memferry_region_allocate(bytes, &from, &error), "allocate");
  must(memferry_region_allocate(bytes, &to, &error), "allocate");
  write_pages(from, 1);
  write_pages(from, 2);

  /* What both sides must know alike; a control connection of one's own tells it. */
  struct memferry_session session = {.channels = 2};
  if (getrandom(session.migration, sizeof session.migration, 0) < 0) return 1;
  if (getrandom(session.key, sizeof session.key, 0) < 0) return 1;

  memferry_listener* listener;
  must(memferry_listener_create("127.0.0.1", 0, &listener, &error), "listen");
  struct memferry_receiver_options receiving = {.size = sizeof receiving,
                                                .session = session,
                                                .regions = &to,
                                                .region_count = 1,
                                                .may_page = 1,
                                                .keep_digests = 1,
                                                .encodings = "lz4"};
  memferry_receiver* receiver;
  must(memferry_receiver_create(&receiving, &receiver, &error), "receiver");
  must(memferry_listener_add(listener, receiver, &error), "add");

  memferry_tracker* tracker;
  must(memferry_tracker_create(from, NULL, &tracker, &error), "tracker");
  must(memferry_tracker_arm(tracker, &error), "arm");
  struct memferry_sender_options sending = {.size = sizeof sending,
                                            .session = session,
                                            .regions = &from,
                                            .trackers = &tracker,
                                            .region_count = 1,
                                            .host = "127.0.0.1",
                                            .port = memferry_listener_port(listener),
                                            .compress = "lz4"};
  memferry_sender* sender;
  must(memferry_sender_create(&sending, &sender, &error), "sender");
  must(memferry_sender_connect(sender, &error), "connect");
  must(memferry_sender_wait(sender, MEMFERRY_EVENT_CONNECTED, 0, ROUND_MS, &error), "connect");

  /* Rounds. The guest writes meanwhile. */
  must(memferry_sender_queue_populated(sender, &error), "queue");
  must(memferry_sender_start_round(sender, 1, &error), "round 1");
  write_pages(from, 3);
  must(memferry_sender_wait(sender, MEMFERRY_EVENT_ROUND_DONE, 1, ROUND_MS, &error), "round 1");
  uint64_t dirty;
  must(memferry_sender_queue_dirty(sender, &dirty, &error), "queue");
  must(memferry_sender_start_round(sender, 2, &error), "round 2");
  must(memferry_sender_wait(sender, MEMFERRY_EVENT_ROUND_DONE, 2, ROUND_MS, &error), "round 2");
  write_pages(from, 4);

  /* The guest stands. What it has written since is missing at the destination from here on, and served. */
  must(memferry_sender_switch_over(sender, &error), "switch");
  must(memferry_sender_wait(sender, MEMFERRY_EVENT_SWITCHED, 0, ROUND_MS, &error), "switch");
  int ready = 0;
  must(memferry_receiver_seal(receiver, &ready, &error), "seal");
  if (!ready) return 1;

  /* The guest runs at the destination: this waits for its page. */
  const unsigned char* late = memferry_region_page(to, 4);
  if (late[0] != (unsigned char)(1 + (4 + 4) % 250)) {
    fprintf(stderr, "a page that is missing reads as something else\n");
    return 1;
  }
  must(memferry_sender_start_push(sender, &error), "push");
  must(memferry_sender_wait(sender, MEMFERRY_EVENT_EVICTED, 0, ROUND_MS, &error), "push");
  must(memferry_receiver_wait(receiver, MEMFERRY_EVENT_COMPLETE, ROUND_MS, &error), "complete");

  struct memferry_sender_stats sent = {.size = sizeof sent};
  struct memferry_receiver_stats received = {.size = sizeof received};
  must(memferry_sender_get_stats(sender, &sent, &error), "stats");
  must(memferry_receiver_get_stats(receiver, &received, &error), "stats");
  uint8_t left[16], arrived[16];
  must(memferry_sender_digest(sender, 0, left, &error), "digest");
  must(memferry_receiver_digest(receiver, 0, arrived, &error), "digest");
  must(memferry_sender_close(sender, 1, &error), "close");
  must(memferry_listener_remove(listener, receiver, &error), "remove");
  must(memferry_receiver_close(receiver, &error), "close");
  must(memferry_listener_close(listener, &error), "close");

  const int same = memcmp(left, arrived, sizeof left) == 0 &&
                   memcmp(memferry_region_page(from, 0), memferry_region_page(to, 0), bytes) == 0;
  printf("%s: %d pages, %llu dirty in round 2, %llu sent, %llu by demand\n", same ? "the same" : "DIFFERENT",
         PAGES, (unsigned long long)dirty, (unsigned long long)sent.pages_sent,
         (unsigned long long)received.remote_faults);
  memferry_tracker_close(tracker);
  must(memferry_region_close(from, &error), "close");
  must(memferry_region_close(to, &error), "close");
  return same && dirty > 0 && received.remote_faults > 0 ? 0 : 1;
}
