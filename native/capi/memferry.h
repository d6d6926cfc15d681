/*
 * memferry: moves live memory between processes and machines while its owner keeps running. This is the C interface of
 * the core, for those who embed it without Node: hypervisors, supervisors, agents. docs/embedding.md is its guide,
 * docs/protocol.md what travels.
 *
 * Conventions
 *   Results    A function that can fail returns MEMFERRY_OK (0) or an enum memferry_code, and writes code and text into
 *              the caller's memferry_error, where one is given (NULL is fine). No exception ever leaves the library.
 *   Structures Each that a caller fills or reads begins with `size`, which the caller sets to sizeof of it, and is
 *              otherwise all zeros: 0 or NULL is each field's default. So a program that was built with an older
 *              memferry.h runs with a newer library; one that uses a field that this library does not know gets
 *              MEMFERRY_INVALID_ARGUMENT.
 *                  struct memferry_sender_options options = {.size = sizeof options};
 *   Handles    Opaque. A ..._close() ends one, may be given NULL, and must not be called twice. What was made with a
 *              region keeps it until it is closed itself; a region may be closed before.
 *   Texts      UTF-8, ended by a zero. Those that a callback is given are valid until it returns.
 *   Units      Bytes, pages (numbered from a region's first page on) and milliseconds, as the names say. A rate is in
 *              bytes a second, 0 for none.
 *   Threads    Every function may be called from any thread, on one handle also at once, unless it says otherwise. Callbacks
 *              come from threads of the library, whose names are given; none holds a lock. They must not throw, and must not close
 *              what calls them (MEMFERRY_WRONG_THREAD).
 *   Signals    The library's threads block all signals and install no handler. A page that is lost is poisoned: whoever
 *              touches it gets SIGBUS, never zeros.
 */
#ifndef MEMFERRY_H
#define MEMFERRY_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MEMFERRY_VERSION_MAJOR 0
#define MEMFERRY_VERSION_MINOR 1
#define MEMFERRY_VERSION_PATCH 0
#define MEMFERRY_VERSION \
  ((MEMFERRY_VERSION_MAJOR << 16) | (MEMFERRY_VERSION_MINOR << 8) | MEMFERRY_VERSION_PATCH)

#if defined(__GNUC__)
#define MEMFERRY_API __attribute__((visibility("default")))
#else
#define MEMFERRY_API
#endif

/* ---- version and errors ---- */

/* The library's own MEMFERRY_VERSION. Before 1.0 the minor number is part of what must match. */
MEMFERRY_API uint32_t memferry_version(void);

/* The numbers are stable, and so are the names, which docs/ and the TypeScript side use too. */
enum memferry_code {
  MEMFERRY_OK = 0,
  MEMFERRY_INVALID_ARGUMENT = 1,         /* arguments that make no sense; nothing happened */
  MEMFERRY_NO_MEMORY = 2,                /* no memory, or address space, for what was asked */
  MEMFERRY_SYSTEM = 3,                   /* a system call failed: system_error has its errno */
  MEMFERRY_WRONG_THREAD = 4,             /* from a callback of what it would end */
  MEMFERRY_TIMEOUT = 5,                  /* of a ..._wait(): not yet */
  MEMFERRY_REGION_UNALIGNED = 6,         /* not whole pages */
  MEMFERRY_REGION_BUSY = 7,              /* it is moving already */
  MEMFERRY_REGION_GONE = 8,              /* it was closed */
  MEMFERRY_TRACKER_UNAVAILABLE = 9,      /* the text says why, and how to get it */
  MEMFERRY_USERFAULTFD_UNAVAILABLE = 10, /* likewise */
  MEMFERRY_AUTH_FAILED = 11,        /* the peer does not know the secret, or its file cannot be trusted */
  MEMFERRY_PLAINTEXT_REQUIRED = 12, /* an address beyond loopback, and plaintext was not said */
  MEMFERRY_PROTOCOL_ERROR = 13,     /* the peer said what the protocol does not allow */
  MEMFERRY_VERSION_MISMATCH = 14,
  MEMFERRY_CONNECT_FAILED = 15,
  MEMFERRY_CHANNEL_LOST = 16, /* a connection was cut where it cannot be taken up again */
  MEMFERRY_PEER_LOST = 17,    /* the peer is gone, or did not answer in time */
  MEMFERRY_LIMIT_EXCEEDED = 18,
  MEMFERRY_CANCELLED = 19,
  MEMFERRY_PREPARE_FAILED = 20,
  MEMFERRY_PREPARE_TIMEOUT = 21,
  MEMFERRY_MODULE_REFUSED = 22,
  MEMFERRY_VERIFICATION_FAILED = 23, /* the digests differ */
  MEMFERRY_MIGRATION_IN_DOUBT = 24,  /* the guest may run elsewhere, so it does not run here */
  MEMFERRY_GUEST_LOST = 25,
  MEMFERRY_PAGES_LOST = 26,   /* pages that cannot be had any more; they are poisoned */
  MEMFERRY_VMD_CAPACITY = 27, /* no room at the VMD servers */
  MEMFERRY_VMD_LOST = 28,     /* the image is not there any more */
  MEMFERRY_VMD_REFUSED = 29,  /* somebody else has the claim, or it is not the time */
  MEMFERRY_GUEST_BUSY = 30,
  MEMFERRY_PAUSE_FAILED = 31,
  MEMFERRY_PAUSE_TIMEOUT = 32
};

/* "NO_MEMORY"; "UNKNOWN" for a number that is none. */
MEMFERRY_API const char* memferry_code_name(int code);

struct memferry_error {
  size_t size;
  int32_t code;
  int32_t system_error; /* errno, or 0 */
  char text[488];       /* cut at a character where it is longer */
};

/* ---- regions: memory that can move ---- */

typedef struct memferry_region memferry_region;

struct memferry_extent {
  void* start;    /* page-aligned */
  uint64_t bytes; /* whole pages */
};

struct memferry_run {
  uint32_t region; /* its index in a table */
  uint32_t reserved;
  uint64_t first; /* page */
  uint64_t count; /* pages */
};

MEMFERRY_API uint64_t memferry_page_size(void);

/* Private anonymous memory, zeros, unmapped when the region is closed and nothing uses it any more. */
MEMFERRY_API int memferry_region_allocate(uint64_t bytes, memferry_region** region,
                                          struct memferry_error* error);

/*
 * The caller's own memory of this process, numbered as one sequence of pages: private or shared anonymous memory, a
 * memfd. `capacity_bytes`: how far the last extent may grow in place, 0 for not at all. Close the region before any of it
 * is unmapped or remapped.
 */
MEMFERRY_API int memferry_region_adopt(const struct memferry_extent* extents, size_t count,
                                       uint64_t capacity_bytes, memferry_region** region,
                                       struct memferry_error* error);

MEMFERRY_API uint64_t memferry_region_bytes(const memferry_region* region);
MEMFERRY_API uint64_t memferry_region_capacity(const memferry_region* region);
/* Where a page is, or NULL for one that is none. */
MEMFERRY_API void* memferry_region_page(const memferry_region* region, uint64_t page);
/* The memory is there already: the region has grown in place. */
MEMFERRY_API int memferry_region_grow(memferry_region* region, uint64_t bytes, struct memferry_error* error);
/* First everything that still touches the memory is stopped (a migration then ends with REGION_GONE). */
MEMFERRY_API int memferry_region_close(memferry_region* region, struct memferry_error* error);

/* ---- trackers: which pages were written? ---- */

typedef struct memferry_tracker memferry_tracker;

/* Whether the tracker of this name ("uffd-wp-async", "hash-diff", ...) works here; it is tried out. */
MEMFERRY_API int memferry_tracker_check(const char* name, struct memferry_error* why_not);
/*
 * NULL: the best that works here and may watch this region. Shared memory may be written by other mappings, which only
 * comparing content sees (hash-diff): cheaper ways need the caller's word, below. One that is named is not tried out: arming
 * it says what is wrong. One thread at a time for each tracker.
 */
MEMFERRY_API int memferry_tracker_create(memferry_region* region, const char* name,
                                         memferry_tracker** tracker, struct memferry_error* error);

/* Where writes to shared memory come from; private memory has no others. */
enum memferry_writers {
  MEMFERRY_WRITERS_ANYWHERE = 0,       /* other mappings, other processes, pwrite() on the file */
  MEMFERRY_WRITERS_TRACKED_MAPPING = 1 /* the caller's word: all of them go through the region's addresses */
};

struct memferry_tracker_options {
  size_t size;
  const char* name; /* NULL: the best that works here and may watch this region */
  int32_t writers;  /* enum memferry_writers */
  /*
   * 1: of the pages that were written only those count that hold something else than a sender that has this tracker last
   * sent. With reserved huge pages one write makes all pages of a huge one count else. 0: as they were written.
   */
  uint32_t split_huge_pages;
};

/* The same with options; NULL: none. */
MEMFERRY_API int memferry_tracker_create_with(memferry_region* region,
                                              const struct memferry_tracker_options* options,
                                              memferry_tracker** tracker, struct memferry_error* error);
MEMFERRY_API const char* memferry_tracker_name(const memferry_tracker* tracker);
/* From now on writes are seen; those before are not. */
MEMFERRY_API int memferry_tracker_arm(memferry_tracker* tracker, struct memferry_error* error);
/*
 * Sets the bits of the pages that were written since arm() or the last collect() (page p: bit p % 64 of word p / 64), leaves
 * others as they are, and re-arms them. A write is reported twice rather than never. `words` covers the region's capacity.
 */
MEMFERRY_API int memferry_tracker_collect(memferry_tracker* tracker, uint64_t* bitmap, size_t words,
                                          uint64_t* pages_written, struct memferry_error* error);
MEMFERRY_API int memferry_tracker_disarm(memferry_tracker* tracker, struct memferry_error* error);
MEMFERRY_API void memferry_tracker_close(memferry_tracker* tracker);

/* ---- the engines: pages from a sender to a receiver ----
 *
 * For those who have a control connection of their own. Who owns the guest is theirs to decide then, and the rules of
 * docs/protocol.md ("Commit") are theirs to keep. A destination that a source of memferry's can migrate to: see
 * memferry_destination below, which does all of that.
 */

enum memferry_event_kind {
  MEMFERRY_EVENT_CONNECTED = 1, /* sender: every channel is up */
  MEMFERRY_EVENT_ROUND_DONE,    /* sender, tag: every page of the round is in the receiver's memory */
  MEMFERRY_EVENT_SWITCHED,      /* both: what is missing is served from here on */
  MEMFERRY_EVENT_EVICTED,       /* sender: every page is in the receiver's memory */
  MEMFERRY_EVENT_FIRST_CHANNEL, /* receiver */
  MEMFERRY_EVENT_COMPLETE,      /* receiver: every page is here, and the memory is ordinary again */
  MEMFERRY_EVENT_LOST, /* receiver: `runs` cannot be had any more; poisoned after acknowledge_loss(), or 250 ms */
  MEMFERRY_EVENT_PAUSED,    /* both, after the switch: the connections were cut */
  MEMFERRY_EVENT_RECOVERED, /* both: going on */
  MEMFERRY_EVENT_FAILED     /* both: over, `error` says why */
};

struct memferry_event {
  size_t size;
  int32_t kind;
  uint32_t reserved;
  uint64_t tag;
  uint64_t suspects; /* ROUND_DONE: pages that changed while they were sent, queued again already */
  const struct memferry_error* error; /* FAILED, LOST */
  const struct memferry_run* runs;    /* LOST */
  size_t run_count;
};

/* From the engine's threads (mf-sender, mf-receiver, mf-send-N, mf-recv-N), in order; must not block. */
typedef void memferry_on_event(void* context, const struct memferry_event* event);

struct memferry_session {
  uint8_t migration[16]; /* another one for each migration */
  uint8_t key[32];       /* secret, of this migration alone: whoever knows it can connect */
  uint32_t channels;     /* data connections, 1 to 16; 0: 2. The same on both sides */
  uint32_t reserved;
};

struct memferry_sender_options {
  size_t size;
  struct memferry_session session;
  memferry_region* const* regions;
  memferry_tracker* const* trackers; /* one a region, or NULL where nothing will be collected; or NULL */
  size_t region_count;
  const char* host; /* numeric; where the receiver's listener is */
  uint16_t port;
  uint16_t reserved[3];
  uint64_t bandwidth;
  const char* compress;        /* "off", "auto", "lz4", "zstd"; NULL: "off" */
  uint32_t connect_timeout_ms; /* 0: 5000 */
  uint32_t recover_timeout_ms; /* 0: 60000 */
  memferry_on_event* on_event;
  void* context;
};

struct memferry_sender_stats {
  size_t size;
  uint64_t bytes_on_wire;
  uint64_t pages_sent;
  uint64_t pages_zero;
  uint64_t pages_resent;
  uint64_t pages_pending;
  uint64_t faults_served;
  uint64_t redials;
  uint64_t extra_memory_bytes;
};

typedef struct memferry_sender memferry_sender;

/*
 *   connect -> CONNECTED, then rounds: queue_populated() or queue_dirty(), start_round(tag) -> ROUND_DONE. Copying ends
 *   there, after a last round of the guest that stands. Post-copy goes on: [discard_dirty(tag) -> ROUND_DONE, while the
 *   guest runs], the guest stands, switch_over() -> SWITCHED, start_push() -> EVICTED.
 *   Before the switch a cut is FAILED; after it the sender redials until recover_timeout_ms, and keeps every page.
 */
MEMFERRY_API int memferry_sender_create(const struct memferry_sender_options* options,
                                        memferry_sender** sender, struct memferry_error* error);
MEMFERRY_API int memferry_sender_connect(memferry_sender* sender, struct memferry_error* error);
MEMFERRY_API int memferry_sender_queue_populated(memferry_sender* sender, struct memferry_error* error);
MEMFERRY_API int memferry_sender_queue_dirty(memferry_sender* sender, uint64_t* pages_pending,
                                             struct memferry_error* error);
MEMFERRY_API int memferry_sender_start_round(memferry_sender* sender, uint64_t tag,
                                             struct memferry_error* error);
MEMFERRY_API int memferry_sender_discard_dirty(memferry_sender* sender, uint64_t tag,
                                               struct memferry_error* error);
MEMFERRY_API int memferry_sender_switch_over(memferry_sender* sender, struct memferry_error* error);
MEMFERRY_API int memferry_sender_start_push(memferry_sender* sender, struct memferry_error* error);
/* Of a region whose guest stands: equal to memferry_receiver_digest() of what arrived. 16 bytes. */
MEMFERRY_API int memferry_sender_digest(memferry_sender* sender, uint32_t region, uint8_t digest[16],
                                        struct memferry_error* error);
MEMFERRY_API int memferry_sender_set_bandwidth(memferry_sender* sender, uint64_t bandwidth,
                                               struct memferry_error* error);
MEMFERRY_API int memferry_sender_get_stats(memferry_sender* sender, struct memferry_sender_stats* stats,
                                           struct memferry_error* error);
/*
 * Until the event has come, also one that has been already; of ROUND_DONE the one with this tag. FAILED ends every wait
 * with its code. `timeout_ms` < 0: no bound. Not from a callback.
 */
MEMFERRY_API int memferry_sender_wait(memferry_sender* sender, int kind, uint64_t tag, int64_t timeout_ms,
                                      struct memferry_error* error);
/* `goodbye`: the receiver sees an end, not a cut. */
MEMFERRY_API int memferry_sender_close(memferry_sender* sender, int goodbye, struct memferry_error* error);

struct memferry_receiver_options {
  size_t size;
  struct memferry_session session;
  memferry_region* const* regions; /* what is in their memory is dropped */
  size_t region_count;
  int may_page;          /* the sender may switch_over() */
  int keep_digests;      /* 8 bytes a page, for memferry_receiver_digest() */
  const char* encodings; /* what the sender compresses with: "lz4", "zstd", "lz4,zstd"; NULL: nothing */
  uint64_t bandwidth;
  uint32_t recover_timeout_ms; /* 0: 60000 */
  uint32_t reserved;
  memferry_on_event* on_event;
  void* context;
};

struct memferry_receiver_stats {
  size_t size;
  uint64_t bytes_received;
  uint64_t pages_received;
  uint64_t pages_zero;
  uint64_t pages_missing;
  uint64_t remote_faults;
  double remote_fault_p50_us;
  double remote_fault_p99_us;
  double remote_fault_max_us;
  uint64_t extra_memory_bytes;
  uint64_t pages_gathered; /* from VMD servers */
};

typedef struct memferry_receiver memferry_receiver;
typedef struct memferry_listener memferry_listener;

MEMFERRY_API int memferry_receiver_create(const struct memferry_receiver_options* options,
                                          memferry_receiver** receiver, struct memferry_error* error);
/*
 * Every page that was sent is whole, or what is missing is served; what is whole is written no more. Otherwise
 * *ready is 0: the guest must not run here.
 */
MEMFERRY_API int memferry_receiver_seal(memferry_receiver* receiver, int* ready,
                                        struct memferry_error* error);
MEMFERRY_API int memferry_receiver_digest(memferry_receiver* receiver, uint32_t region, uint8_t digest[16],
                                          struct memferry_error* error);
MEMFERRY_API int memferry_receiver_acknowledge_loss(memferry_receiver* receiver,
                                                    struct memferry_error* error);
MEMFERRY_API int memferry_receiver_get_stats(memferry_receiver* receiver,
                                             struct memferry_receiver_stats* stats,
                                             struct memferry_error* error);
MEMFERRY_API int memferry_receiver_wait(memferry_receiver* receiver, int kind, int64_t timeout_ms,
                                        struct memferry_error* error);
/* What is missing is poisoned, and who waits for it woken. */
MEMFERRY_API int memferry_receiver_close(memferry_receiver* receiver, struct memferry_error* error);

/* Takes connections for receivers; a thread of its own (mf-listener). `port` 0: any. */
MEMFERRY_API int memferry_listener_create(const char* host, uint16_t port, memferry_listener** listener,
                                          struct memferry_error* error);
MEMFERRY_API uint16_t memferry_listener_port(const memferry_listener* listener);
MEMFERRY_API int memferry_listener_add(memferry_listener* listener, memferry_receiver* receiver,
                                       struct memferry_error* error);
MEMFERRY_API int memferry_listener_remove(memferry_listener* listener, memferry_receiver* receiver,
                                          struct memferry_error* error);
MEMFERRY_API int memferry_listener_close(memferry_listener* listener, struct memferry_error* error);

/* ---- pagers: memory whose pages come when they are touched, from wherever the caller has them ---- */

typedef struct memferry_pager memferry_pager;

/*
 * `first` is waited for, and the pages behind it are welcome. From the pager's thread (mf-pager); must not block: answer by
 * install() from any thread, now or later. Told once for each fault; what still waits is told again by ask_again(). In
 * reserved huge pages a fault waits for all of one: what is missing of it is told in several runs, and by and by again.
 */
typedef void memferry_on_fault(void* context, uint32_t region, uint64_t first, uint64_t count);

struct memferry_pager_options {
  size_t size;
  memferry_region* const* regions; /* what is in their memory is dropped */
  size_t region_count;
  memferry_on_fault* on_fault;
  /* The memory is not what it should be (unmapped, ...): the pager is over. From any thread. May be NULL. */
  void (*on_broken)(void* context, const struct memferry_error* error);
  void* context;
};

/* From its return on every page is missing, and faults are told. */
MEMFERRY_API int memferry_pager_create(const struct memferry_pager_options* options, memferry_pager** pager,
                                       struct memferry_error* error);
/* Puts them where they are missing, never over what is there. `bytes` NULL: zeros. */
MEMFERRY_API int memferry_pager_install(memferry_pager* pager, uint32_t region, uint64_t first,
                                        uint64_t count, const void* bytes, struct memferry_error* error);
/* These cannot be had: touching one fails. */
MEMFERRY_API int memferry_pager_lose(memferry_pager* pager, uint32_t region, uint64_t first, uint64_t count,
                                     struct memferry_error* error);
/* For a store that was away, and is back. */
MEMFERRY_API int memferry_pager_ask_again(memferry_pager* pager, struct memferry_error* error);
MEMFERRY_API uint64_t memferry_pager_missing(const memferry_pager* pager);
/* With every page there the memory is ordinary again. Otherwise what is missing is poisoned, and never reads as zeros. */
MEMFERRY_API int memferry_pager_close(memferry_pager* pager, struct memferry_error* error);

/* ---- the destination: guests arrive from sources that speak memferry's protocol (TypeScript, the command line) ---- */

typedef struct memferry_destination memferry_destination;
typedef struct memferry_arrival memferry_arrival;

struct memferry_offered_region {
  const char* name;
  uint64_t length_bytes;
  uint64_t capacity_bytes; /* how long it may become before the guest pauses */
  uint64_t page_size;
};

struct memferry_offer {
  size_t size;
  const char* migration; /* 32 hexadecimal digits */
  /* "stop-and-copy", "pre-copy", "post-copy", "hybrid", "scatter", "scatter-pre-copy", "scatter-hybrid" */
  const char* mode;
  const char* guest;
  const char* module;        /* what code the guest wants to be run by, or NULL */
  const char* module_sha256; /* of it, 64 hexadecimal digits, or NULL */
  const char* description;   /* JSON: the source's own words */
  const struct memferry_offered_region* regions;
  size_t region_count;
};

struct memferry_acceptance {
  size_t size;
  void* guest; /* given to the callbacks below */
  /* As many as were offered, each as long. The array is copied, the handles stay the embedder's. */
  memferry_region* const* regions;
  size_t region_count;
  int accepts_module; /* an offer with a module is declined without: a peer never chooses what code runs */
  uint32_t reserved;
};

struct memferry_arrival_report {
  size_t size;
  const char* migration;
  const char* guest;
  uint64_t heap_bytes;
  int verified; /* the digests of both sides are equal */
  uint32_t reserved;
  double prepare_ms;
  double gather_ms; /* from resume until every page was here */
  struct memferry_receiver_stats stats;
};

/*
 *   accept - [grow ...] - prepare -+- resume - [lost ...] -+- complete -+- ended
 *              |             |     |                       +- failed ---+
 *              +-------------+-----+- abandon --------------------------+
 *
 * From the arrival's thread (mf-arrival), one after the other, but `prepare`, which has one of its own (mf-prepare).
 * At most one side ever runs the guest: between a `prepare` that returned 0 and `resume` or `abandon` it must stand, however
 * long that takes. `accept`, `prepare`, `resume` and `abandon` must be given.
 */
struct memferry_destination_callbacks {
  size_t size;
  /* 0: with *answer filled in. A memferry_code: declined, and the source is told why->text. */
  int (*accept)(void* context, memferry_arrival* arrival, const struct memferry_offer* offer,
                struct memferry_acceptance* answer, struct memferry_error* why);
  /* Makes the memory at least so long, in place. NULL: guests do not grow here. */
  int (*grow)(void* guest, memferry_arrival* arrival, uint32_t region, uint64_t length_bytes,
              struct memferry_error* why);
  /*
   * The guest stands at its source, and this is its state. Everything that can fail; it may touch the memory, which is
   * served where it has not come yet. Past prepare_timeout_ms, or once memferry_arrival_cancelled() says so, nobody waits
   * for it any more, and it should return.
   */
  int (*prepare)(void* guest, memferry_arrival* arrival, const void* state, size_t bytes,
                 struct memferry_error* why);
  /* The guest is this side's for good: let it run. Nothing may fail, and it should take microseconds. */
  void (*resume)(void* guest, memferry_arrival* arrival);
  /* It has not run here and never will. */
  void (*abandon)(void* guest, memferry_arrival* arrival, const struct memferry_error* why);
  /*
   * Pages that cannot be had any more: touching one fails from the return of this on. Of a scatter it may come more than
   * once, why->text names the VMD servers that had them, and every other page still comes.
   */
  void (*lost)(void* guest, memferry_arrival* arrival, const struct memferry_run* runs, size_t count,
               const struct memferry_error* why);
  /* Every page is here. */
  void (*complete)(void* guest, memferry_arrival* arrival, const struct memferry_arrival_report* report);
  /* It runs here, and not every page came, or not as it left its source. */
  void (*failed)(void* guest, memferry_arrival* arrival, const struct memferry_error* why);
  /* Nothing of the arrival is left, and its handle ends. Always the last, once accept has returned 0. */
  void (*ended)(void* guest, memferry_arrival* arrival);
};

struct memferry_destination_options {
  size_t size;
  const char* host; /* numeric; NULL: "127.0.0.1" */
  uint16_t port;    /* 0: any */
  uint16_t reserved[3];
  const void* secret; /* what sources and destinations share, at least 16 bytes */
  size_t secret_bytes;
  const char*
      secret_file; /* or a file that has it: this user's own, of mode 0600; white space at its end does not count */
  int plaintext;            /* a host beyond loopback: memory and states can be read and changed on the way */
  uint32_t max_migrations;  /* 0: 16 */
  uint64_t max_bytes;       /* of all guests that are on their way in; 0: 64 GiB */
  uint64_t max_state_bytes; /* 0: 64 MiB */
  uint64_t bandwidth;       /* of each, taken in over the data channels */
  uint32_t prepare_timeout_ms; /* 0: 10000 */
  uint32_t grant_timeout_ms;   /* from READY until this side refuses for good; 0: 20000 */
  uint32_t recover_timeout_ms; /* after a cut in post-copy; 0: 60000 */
  uint32_t peer_timeout_ms;    /* a source that says nothing; 0: 10000 */
  const struct memferry_destination_callbacks* callbacks; /* copied */
  void* context;                                          /* of accept */
  /* Of a scatter, whose offer names the VMD servers: they are dialled with the same secret, and with `plaintext` alone
     where they are beyond loopback. A guest whose servers are not all there is declined. */
  uint64_t
      gather_limit; /* of each, taken in from the servers ahead of the guest; what it waits for is not held back */
  uint32_t connect_timeout_ms; /* of a VMD server; 0: 5000 */
  uint32_t reserved_2;
};

MEMFERRY_API int memferry_destination_create(const struct memferry_destination_options* options,
                                             memferry_destination** destination,
                                             struct memferry_error* error);
MEMFERRY_API uint16_t memferry_destination_port(const memferry_destination* destination);
/*
 * Guests that have not resumed run on at their sources; pages that others still lack are lost. Returns when every callback
 * has returned, a `prepare` that hangs included, and VMD servers have let go of what is complete, or did not answer.
 */
MEMFERRY_API int memferry_destination_close(memferry_destination* destination, struct memferry_error* error);

/* Valid from accept until ended has returned. */
MEMFERRY_API int memferry_arrival_cancelled(const memferry_arrival* arrival);
MEMFERRY_API int memferry_arrival_get_stats(const memferry_arrival* arrival,
                                            struct memferry_receiver_stats* stats,
                                            struct memferry_error* error);
/* Before the commit: the guest runs on at its source. After it: what is missing is lost. Does not wait. */
MEMFERRY_API int memferry_arrival_close(memferry_arrival* arrival, struct memferry_error* error);

/* ---- the VMD: a guest that was parked at its servers is had back ---- */

typedef struct memferry_image memferry_image;

struct memferry_vmd_options {
  size_t size;
  const void* secret; /* as a destination's */
  size_t secret_bytes;
  const char* secret_file;
  int plaintext;
  uint32_t connect_timeout_ms;  /* 0: 5000 */
  uint32_t recover_timeout_ms;  /* a server that is away; 0: 60000 */
  uint32_t in_doubt_timeout_ms; /* of grant(); 0: 30000 */
  uint64_t max_state_bytes;     /* 0: 64 MiB */
  int with_losses;              /* claim it although pages are away with servers: they are lost */
};

/*
 *   claim - serve - (prepare the guest: everything that can fail) - grant - (it runs here) - wait - close
 *
 * `ticket`: JSON, as `memferry park`, park() and memferry_park_ticket() give it. Nobody else can have the guest from here
 * on, unless this is closed before it was granted. VMD_REFUSED: somebody has it. Servers that are away are waited for before
 * that, for connect_timeout_ms.
 */
MEMFERRY_API int memferry_image_claim(const struct memferry_vmd_options* options, const char* ticket,
                                      memferry_image** image, struct memferry_error* error);
/* Valid until the image is closed. */
MEMFERRY_API const char* memferry_image_guest(const memferry_image* image);
MEMFERRY_API const char* memferry_image_description(const memferry_image* image);
MEMFERRY_API size_t memferry_image_region_count(const memferry_image* image);
MEMFERRY_API int memferry_image_region(const memferry_image* image, size_t index,
                                       struct memferry_offered_region* region, struct memferry_error* error);
MEMFERRY_API const void* memferry_image_state(const memferry_image* image, size_t* bytes);
/* What is in the regions' memory is dropped; from the return on pages come when they are touched, and ahead of that. */
MEMFERRY_API int memferry_image_serve(memferry_image* image, memferry_region* const* regions, size_t count,
                                      memferry_on_event* on_event, void* context,
                                      struct memferry_error* error);
/*
 * The commit. MEMFERRY_OK: the guest is the caller's, and runs nowhere else. MIGRATION_IN_DOUBT: nobody knows, and it
 * must not run here. CONNECT_FAILED, PEER_LOST, VMD_LOST: a server is away that has pages which no other has, and the guest
 * stays parked (with_losses).
 */
MEMFERRY_API int memferry_image_grant(memferry_image* image, struct memferry_error* error);
/*
 * Until every page is here and was compared with the digests that the guest left with; the servers then let go of it.
 * TIMEOUT: not yet. PAGES_LOST: told by on_event; what is lost is poisoned. INVALID_ARGUMENT before the grant.
 */
MEMFERRY_API int memferry_image_wait(memferry_image* image, int64_t timeout_ms, struct memferry_error* error);
MEMFERRY_API int memferry_image_get_stats(memferry_image* image, struct memferry_receiver_stats* stats,
                                          struct memferry_error* error);
/* Not granted: the guest stays parked. Granted, and pages are missing: they are poisoned. */
MEMFERRY_API int memferry_image_close(memferry_image* image, struct memferry_error* error);

/* ---- the VMD: a guest that stands is parked at its servers ---- */

typedef struct memferry_park memferry_park;

struct memferry_named_region {
  const char* name; /* 1 to 64 characters */
  memferry_region* region;
};

struct memferry_park_options {
  size_t size;
  const void* secret; /* as a destination's, and that of the servers */
  size_t secret_bytes;
  const char* secret_file;
  int plaintext;     /* servers beyond loopback: memory and state can be read and changed on the way */
  uint32_t replicas; /* at how many servers each page is kept, 1 or 2; 0: 1 */
  /* VMD servers (`memferry stage`): "HOST:PORT", numeric. Who does not answer is passed over, if the others have room. The
     first that answers is the guest's home, which says whose the guest is. */
  const char* const* servers;
  size_t server_count; /* 1 to 250 */
  const char* guest;   /* its name, 1 to 64 characters */
  const char* module;  /* what code runs it, for who claims it, or NULL; and of that 64 hexadecimal digits */
  const char* module_sha256;
  const char* description; /* JSON, for who claims it; NULL: null */
  uint64_t bandwidth;
  const char* compress;        /* "off", "auto", "lz4", "zstd"; NULL: "off" */
  uint64_t max_state_bytes;    /* 0: 64 MiB, which is what servers take unless they are told otherwise */
  uint32_t connect_timeout_ms; /* of a server; 0: 5000 */
  /* A server that takes nothing for so long is given up; 0: 3000. With two replicas at least 2000. */
  uint32_t stall_timeout_ms;
  uint32_t prepare_timeout_ms;  /* for the home server to say that it has everything; 0: 10000 */
  uint32_t in_doubt_timeout_ms; /* of the commit; 0: 30000 */
  /* How long servers keep what was not committed, if this process ends; 0: 60000, else 100 to 3600000. */
  uint32_t lease_ms;
  uint32_t reserved;
};

struct memferry_park_stats {
  size_t size;
  uint64_t bytes_on_wire;
  uint64_t pages_sent;
  uint64_t pages_zero;
  uint64_t pages_resent;
  uint64_t pages_pending;
  uint64_t extra_memory_bytes;
  double eviction_ms;      /* of evict(), until the guest was parked; 0 before */
  uint32_t servers;        /* that answered */
  uint32_t servers_failed; /* of these, given up since */
};

/*
 *   create - (keep the ticket) - evict - close
 *
 * The guest stands: from create() on nothing writes the regions, and nobody lets it run, until evict() has failed or
 * the park was closed before it. Until the commit, the last thing that evict() does, it is the caller's, whatever fails.
 *
 * Makes the guest's image at every server that answers; the state is copied. Servers are asked 16 at a time: for each 16,
 * it takes at most connect_timeout_ms and some seconds for each of two exchanges. CONNECT_FAILED, AUTH_FAILED: none answers. VMD_CAPACITY: those that
 * do have no room. REGION_BUSY. Then nothing of it is left anywhere.
 */
MEMFERRY_API int memferry_park_create(const struct memferry_park_options* options,
                                      const struct memferry_named_region* regions, size_t count,
                                      const void* state, size_t state_bytes, memferry_park** park,
                                      struct memferry_error* error);
/*
 * JSON, as `memferry park` writes it; valid until the park is closed. A secret. It claims the guest (memferry_image_claim(),
 * unpark()) once evict() has returned MEMFERRY_OK; kept before, it does so whatever becomes of this process meanwhile.
 */
MEMFERRY_API const char* memferry_park_ticket(const memferry_park* park);
/*
 * Returns when every page is acknowledged by as many servers as it has replicas, the index servers have the map, and the home
 * server owns the guest; as long as servers take pages, that takes.
 *
 *   MEMFERRY_OK         The guest is parked, and never runs here again. The regions may go. Again: MEMFERRY_OK.
 *   MIGRATION_IN_DOUBT  The home server was granted the guest and does not answer: it must not run here. Call again to ask
 *                       again, for another in_doubt_timeout_ms; OK is then what it says, or the code of why the guest is
 *                       the caller's.
 *   GUEST_LOST          The same, and the home server has been restarted since: nobody knows any more. It must not run here.
 *   anything else       The guest is the caller's and may run here; the servers were told to let go of it. This park is
 *                       over. CANCELLED; PEER_LOST: the home server is gone, or one that had pages when the last of them
 *                       went; VMD_CAPACITY: the servers that are left do not take what is left; PROTOCOL_ERROR: the guest
 *                       did not stand; REGION_GONE; PREPARE_TIMEOUT; ...
 */
MEMFERRY_API int memferry_park_evict(memferry_park* park, struct memferry_error* error);
/* From any thread: an evict() that has not begun to commit, now or later, ends with CANCELLED, at the latest when it has
   hashed the region that it is hashing. Does not wait. */
MEMFERRY_API int memferry_park_cancel(memferry_park* park, struct memferry_error* error);
MEMFERRY_API int memferry_park_get_stats(memferry_park* park, struct memferry_park_stats* stats,
                                         struct memferry_error* error);
/*
 * Not while another function of it is called. Before evict(): the servers are told to let go of the image. In doubt: nobody
 * asks any more, and the guest must not run here.
 */
MEMFERRY_API int memferry_park_close(memferry_park* park, struct memferry_error* error);

#ifdef __cplusplus
}
#endif

#endif
