/*
 * A destination in C: guests arrive from any source that speaks memferry's protocol, one thread of this program then is
 * the guest. It says on standard output what happens, one JSON object a line, and takes commands on standard input:
 *
 *   stand           the guest stops writing
 *   dump DIRECTORY  stand, and every region into a file there, as the guest left its source
 *   close           the destination is closed
 *   end             and the program ends
 *
 * At the end of standard input it ends too, unless it is told to stay.
 *
 *   destination [--secret-file FILE] [--port N] [--stay yes] [--prepare touch|fail|hang] [--grant-timeout-ms N] [...]
 *
 * MEMFERRY_SECRET is the secret where no file is given.
 */
#define _GNU_SOURCE
#include <memferry.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MOST_REGIONS = 64 };

struct guest {
  memferry_region* regions[MOST_REGIONS];
  size_t region_count;
  uint64_t* writes[MOST_REGIONS]; /* how often each page was written here */
  pthread_t thread;
  int resumed; /* the arrival's thread's; running is the main thread's from then on */
  int running;
  atomic_int stop;
  uint64_t first_ns, last_ns;
};

static const char* prepare_behaviour = "touch";
static int stay;
static memferry_destination* destination;
static _Atomic(struct guest*) guest; /* the newest that has run here: it stays */
static pthread_mutex_t output = PTHREAD_MUTEX_INITIALIZER;

static void say(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  pthread_mutex_lock(&output);
  vprintf(format, arguments);
  putchar('\n');
  fflush(stdout);
  pthread_mutex_unlock(&output);
  va_end(arguments);
}

static uint64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* The last eight bytes of a page are the guest's to count in: what was there plus how often it wrote. */
static uint64_t* counter(struct guest* of, size_t region, uint64_t page) {
  char* start = memferry_region_page(of->regions[region], page);
  return (uint64_t*)(start + memferry_page_size() - sizeof(uint64_t));
}

/* The guest: it writes pages in a pseudo-random order, and waits for those that are still on their way. */
static void* run(void* argument) {
  struct guest* self = argument;
  uint64_t random = 88172645463325252u;
  self->first_ns = now_ns();
  while (!atomic_load(&self->stop)) {
    for (int i = 0; i < 8; i++) {
      random ^= random << 13;
      random ^= random >> 7;
      random ^= random << 17;
      const size_t region = random % self->region_count;
      const uint64_t page =
          (random >> 8) % (memferry_region_bytes(self->regions[region]) / memferry_page_size());
      *counter(self, region, page) += 1;
      self->writes[region][page]++;
    }
    self->last_ns = now_ns();
    usleep(1000);
  }
  return NULL;
}

static void stand(struct guest* of) {
  if (!of || !of->running) return;
  atomic_store(&of->stop, 1);
  pthread_join(of->thread, NULL);
  of->running = 0;
  say("{\"event\":\"stands\",\"first\":\"%llu\",\"last\":\"%llu\"}", (unsigned long long)of->first_ns,
      (unsigned long long)of->last_ns);
}

static void release(struct guest* of) {
  for (size_t i = 0; i < of->region_count; i++) {
    memferry_region_close(of->regions[i], NULL);
    free(of->writes[i]);
  }
  free(of);
}

/* Memory for the guest, before the source sends any of it. */
static int accept_guest(void* context, memferry_arrival* arrival, const struct memferry_offer* offer,
                        struct memferry_acceptance* answer, struct memferry_error* why) {
  (void)context;
  (void)arrival;
  struct guest* made = calloc(1, sizeof *made);
  if (!made) return MEMFERRY_NO_MEMORY;
  for (size_t i = 0; i < offer->region_count; i++) {
    const int code = memferry_region_allocate(offer->regions[i].length_bytes, &made->regions[i], why);
    made->region_count = code == MEMFERRY_OK ? i + 1 : i;
    if (code == MEMFERRY_OK)
      made->writes[i] = calloc(offer->regions[i].length_bytes / memferry_page_size(), sizeof(uint64_t));
    if (code != MEMFERRY_OK || !made->writes[i]) {
      release(made);
      return code != MEMFERRY_OK ? code : MEMFERRY_NO_MEMORY;
    }
  }
  answer->guest = made;
  answer->regions = made->regions;
  answer->region_count = made->region_count;
  say("{\"event\":\"accept\",\"mode\":\"%s\",\"migration\":\"%s\"}", offer->mode, offer->migration);
  return MEMFERRY_OK;
}

/* Everything that can fail. A page that it touches may still be at the source: then it waits for it. */
static int prepare_guest(void* of, memferry_arrival* arrival, const void* state, size_t bytes,
                         struct memferry_error* why) {
  (void)state;
  struct guest* self = of;
  say("{\"event\":\"prepare\",\"bytes\":%zu}", bytes);
  if (strcmp(prepare_behaviour, "fail") == 0) {
    snprintf(why->text, sizeof why->text, "this guest cannot be prepared");
    return MEMFERRY_PREPARE_FAILED;
  }
  while (strcmp(prepare_behaviour, "hang") == 0 && !memferry_arrival_cancelled(arrival)) usleep(1000);
  /* Once it is cancelled pages that have not come never will: touching one would be SIGBUS. */
  if (memferry_arrival_cancelled(arrival)) return MEMFERRY_CANCELLED;
  volatile const char* first = memferry_region_page(self->regions[0], 0);
  (void)*first;
  say("{\"event\":\"prepared\"}");
  return MEMFERRY_OK;
}

static void resume_guest(void* of, memferry_arrival* arrival) {
  (void)arrival;
  struct guest* self = of;
  self->resumed = 1;
  self->running = pthread_create(&self->thread, NULL, run, self) == 0;
  atomic_store(&guest, self);
  say("{\"event\":\"resume\"}");
}

static void abandon_guest(void* of, memferry_arrival* arrival, const struct memferry_error* why) {
  (void)of;
  (void)arrival;
  say("{\"event\":\"abandon\",\"code\":\"%s\"}", memferry_code_name(why->code));
}

static void lost_pages(void* of, memferry_arrival* arrival, const struct memferry_run* runs, size_t count,
                       const struct memferry_error* why) {
  (void)arrival;
  (void)why;
  uint64_t pages = 0;
  for (size_t i = 0; i < count; i++) pages += runs[i].count;
  say("{\"event\":\"lost\",\"pages\":%llu}", (unsigned long long)pages);
  /* Pages that this guest would touch are gone: it ends here, before they are poisoned. (A thread that waits for one
     cannot be waited for.) */
  atomic_store(&((struct guest*)of)->stop, 1);
}

static void complete_guest(void* of, memferry_arrival* arrival,
                           const struct memferry_arrival_report* report) {
  (void)of;
  (void)arrival;
  say("{\"event\":\"complete\",\"verified\":%s,\"remoteFaults\":%llu,\"pagesReceived\":%llu,\"pagesZero\":%"
      "llu}",
      report->verified ? "true" : "false", (unsigned long long)report->stats.remote_faults,
      (unsigned long long)report->stats.pages_received, (unsigned long long)report->stats.pages_zero);
}

static void failed_guest(void* of, memferry_arrival* arrival, const struct memferry_error* why) {
  (void)of;
  (void)arrival;
  say("{\"event\":\"failed\",\"code\":\"%s\"}", memferry_code_name(why->code));
}

static void ended_guest(void* of, memferry_arrival* arrival) {
  (void)arrival;
  struct guest* self = of;
  say("{\"event\":\"ended\"}");
  /* A guest that has run here stays; one that has not leaves nothing behind. */
  if (!self->resumed) release(self);
}

static int dump(struct guest* of, const char* directory) {
  stand(of);
  if (!of) return 1;
  for (size_t region = 0; region < of->region_count; region++) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%zu", directory, region);
    FILE* file = fopen(path, "w");
    if (!file) return 1;
    const uint64_t pages = memferry_region_bytes(of->regions[region]) / memferry_page_size();
    for (uint64_t page = 0; page < pages; page++) {
      *counter(of, region, page) -= of->writes[region][page];
      of->writes[region][page] = 0;
      fwrite(memferry_region_page(of->regions[region], page), memferry_page_size(), 1, file);
    }
    if (fclose(file) != 0) return 1;
  }
  return 0;
}

int main(int argc, char** argv) {
  struct memferry_error error = {.size = sizeof error};
  const struct memferry_destination_callbacks callbacks = {.size = sizeof callbacks,
                                                           .accept = accept_guest,
                                                           .prepare = prepare_guest,
                                                           .resume = resume_guest,
                                                           .abandon = abandon_guest,
                                                           .lost = lost_pages,
                                                           .complete = complete_guest,
                                                           .failed = failed_guest,
                                                           .ended = ended_guest};
  struct memferry_destination_options options = {
      .size = sizeof options, .secret_file = NULL, .callbacks = &callbacks};
  for (int i = 1; i + 1 < argc; i += 2) {
    const uint32_t number = (uint32_t)strtoul(argv[i + 1], NULL, 10);
    if (strcmp(argv[i], "--secret-file") == 0)
      options.secret_file = argv[i + 1];
    else if (strcmp(argv[i], "--port") == 0)
      options.port = (uint16_t)number;
    else if (strcmp(argv[i], "--stay") == 0)
      stay = strcmp(argv[i + 1], "yes") == 0;
    else if (strcmp(argv[i], "--prepare") == 0)
      prepare_behaviour = argv[i + 1];
    else if (strcmp(argv[i], "--prepare-timeout-ms") == 0)
      options.prepare_timeout_ms = number;
    else if (strcmp(argv[i], "--grant-timeout-ms") == 0)
      options.grant_timeout_ms = number;
    else if (strcmp(argv[i], "--recover-timeout-ms") == 0)
      options.recover_timeout_ms = number;
    else if (strcmp(argv[i], "--peer-timeout-ms") == 0)
      options.peer_timeout_ms = number;
    else if (strcmp(argv[i], "--max-bytes") == 0)
      options.max_bytes = number;
    else {
      fprintf(stderr, "destination: no option %s\n", argv[i]);
      return 2;
    }
  }
  const char* secret = getenv("MEMFERRY_SECRET");
  if (!options.secret_file && secret) {
    options.secret = secret;
    options.secret_bytes = strlen(secret);
  }
  if (memferry_destination_create(&options, &destination, &error) != MEMFERRY_OK) {
    fprintf(stderr, "destination: %s: %s\n", memferry_code_name(error.code), error.text);
    return 1;
  }
  say("{\"event\":\"listening\",\"port\":%u}", memferry_destination_port(destination));

  char line[4096];
  while (fgets(line, sizeof line, stdin)) {
    line[strcspn(line, "\n")] = '\0';
    if (strcmp(line, "stand") == 0) {
      stand(atomic_load(&guest));
    } else if (strncmp(line, "dump ", 5) == 0) {
      say("{\"event\":\"dumped\",\"ok\":%s}", dump(atomic_load(&guest), line + 5) == 0 ? "true" : "false");
    } else if (strcmp(line, "close") == 0) {
      memferry_destination_close(destination, &error);
      destination = NULL;
      say("{\"event\":\"closed\"}");
    } else if (strcmp(line, "end") == 0) {
      stay = 0;
      break;
    }
  }
  while (stay) pause();
  memferry_destination_close(destination, &error);
  return 0;
}
