// No exception leaves the C interface: every entry is called with each of its memory allocations failing in turn, with
// system calls that fail, and with arguments that make no sense, and answers by code and text. Ends with 0 when all did.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <string>
#include <vector>

#include "capi/memferry.h"
#include "sanitized.h"

namespace {

// Of this thread: the allocation that fails, counted down; 0: none does.
thread_local long failing = 0;

bool fails() { return failing > 0 && --failing == 0; }

int complaints = 0;

void expect(bool held, const char* what, const memferry_error& error) {
  if (held) return;
  ++complaints;
  std::fprintf(stderr, "%s: %s: %s\n", what, memferry_code_name(error.code), error.text);
}

memferry_error blank() {
  memferry_error error{};
  error.size = sizeof error;
  return error;
}

// `call` gives its code; until it succeeds without, it must fail with NO_MEMORY.
void without_memory(const char* what, const std::function<int(memferry_error*)>& call) {
  constexpr long kMost = 20000;
  for (long at = 1; at <= kMost; ++at) {
    memferry_error error = blank();
    failing = at;
    const int code = call(&error);
    const bool unused = failing > 0;
    failing = 0;
    expect(code == error.code, what, error);
    if (code == MEMFERRY_OK && unused) return;
    // Some allocations are nobody's business (a cache, a name): then it succeeds all the same.
    expect(code == MEMFERRY_OK || (code == MEMFERRY_NO_MEMORY && error.text[0] != '\0'), what, error);
  }
  memferry_error never = blank();
  expect(false, "it never succeeds", never);
}

int accept(void*, memferry_arrival*, const memferry_offer*, memferry_acceptance*, memferry_error*) {
  return MEMFERRY_LIMIT_EXCEEDED;
}
int prepare(void*, memferry_arrival*, const void*, size_t, memferry_error*) { return MEMFERRY_OK; }
void resume(void*, memferry_arrival*) {}
void abandon(void*, memferry_arrival*, const memferry_error*) {}
void on_fault(void*, uint32_t, uint64_t, uint64_t) {}

memferry_destination_options destination_options() {
  memferry_destination_options options{};
  options.size = sizeof options;
  options.secret = "sixteen bytes it is";
  options.secret_bytes = 19;
  static const memferry_destination_callbacks given = [] {
    memferry_destination_callbacks callbacks{};
    callbacks.size = sizeof callbacks;
    callbacks.accept = accept;
    callbacks.prepare = prepare;
    callbacks.resume = resume;
    callbacks.abandon = abandon;
    return callbacks;
  }();
  options.callbacks = &given;
  return options;
}

memferry_park_options park_options() {
  static const char* const nobody = "127.0.0.1:9";
  memferry_park_options options{};
  options.size = sizeof options;
  options.secret = "sixteen bytes it is";
  options.secret_bytes = 19;
  options.servers = &nobody;
  options.server_count = 1;
  options.guest = "guest";
  options.connect_timeout_ms = 100;
  return options;
}

memferry_session session() {
  memferry_session session{};
  session.migration[0] = 1;
  session.key[0] = 1;
  return session;
}

void memory() {
  const uint64_t bytes = 64 * memferry_page_size();
  without_memory("region", [&](memferry_error* error) {
    memferry_region* region = nullptr;
    const int code = memferry_region_allocate(bytes, &region, error);
    memferry_region_close(region, nullptr);
    return code;
  });
  memferry_region* region = nullptr;
  memferry_region_allocate(bytes, &region, nullptr);
  without_memory("tracker", [&](memferry_error* error) {
    memferry_tracker* tracker = nullptr;
    int code = memferry_tracker_create(region, "hash-diff", &tracker, error);
    if (code == MEMFERRY_OK) code = memferry_tracker_arm(tracker, error);
    uint64_t dirty[1] = {0};
    if (code == MEMFERRY_OK) code = memferry_tracker_collect(tracker, dirty, 1, nullptr, error);
    memferry_tracker_close(tracker);
    return code;
  });
  without_memory("sender", [&](memferry_error* error) {
    memferry_sender_options options{};
    options.size = sizeof options;
    options.session = session();
    options.regions = &region;
    options.region_count = 1;
    options.host = "127.0.0.1";
    options.port = 9;
    memferry_sender* sender = nullptr;
    const int code = memferry_sender_create(&options, &sender, error);
    memferry_sender_close(sender, 0, nullptr);
    return code;
  });
  without_memory("receiver", [&](memferry_error* error) {
    memferry_receiver_options options{};
    options.size = sizeof options;
    options.session = session();
    options.regions = &region;
    options.region_count = 1;
    options.may_page = 1;
    memferry_receiver* receiver = nullptr;
    const int code = memferry_receiver_create(&options, &receiver, error);
    memferry_receiver_close(receiver, nullptr);
    return code;
  });
  without_memory("pager", [&](memferry_error* error) {
    memferry_pager_options options{};
    options.size = sizeof options;
    options.regions = &region;
    options.region_count = 1;
    options.on_fault = on_fault;
    memferry_pager* pager = nullptr;
    int code = memferry_pager_create(&options, &pager, error);
    if (code == MEMFERRY_OK) code = memferry_pager_install(pager, 0, 0, 64, nullptr, error);
    memferry_pager_close(pager, nullptr);
    return code;
  });
  without_memory("listener", [&](memferry_error* error) {
    memferry_listener* listener = nullptr;
    const int code = memferry_listener_create("127.0.0.1", 0, &listener, error);
    memferry_listener_close(listener, nullptr);
    return code;
  });
  // As far as to a server that is not there.
  without_memory("park", [&](memferry_error* error) {
    const memferry_park_options options = park_options();
    const memferry_named_region named{"memory", region};
    memferry_park* park = nullptr;
    int code = memferry_park_create(&options, &named, 1, "state", 5, &park, error);
    memferry_park_close(park, nullptr);
    if (code == MEMFERRY_CONNECT_FAILED) code = error->code = MEMFERRY_OK;
    return code;
  });
  without_memory("destination", [&](memferry_error* error) {
    const memferry_destination_options options = destination_options();
    memferry_destination* destination = nullptr;
    const int code = memferry_destination_create(&options, &destination, error);
    memferry_destination_close(destination, nullptr);
    return code;
  });
  memferry_region_close(region, nullptr);
}

void system_calls() {
  memferry_error error = blank();
  memferry_region* region = nullptr;
  const uint64_t too_much = uint64_t{1} << 60U;
  expect(memferry_region_allocate(too_much, &region, &error) == MEMFERRY_NO_MEMORY && !region, "allocate",
         error);
  memferry_listener* first = nullptr;
  memferry_listener* second = nullptr;
  expect(memferry_listener_create("127.0.0.1", 0, &first, &error) == MEMFERRY_OK, "listen", error);
  const uint16_t port = memferry_listener_port(first);
  expect(memferry_listener_create("127.0.0.1", port, &second, &error) == MEMFERRY_SYSTEM &&
             error.system_error == EADDRINUSE,
         "a port that is taken", error);
  rlimit before{};
  ::getrlimit(RLIMIT_NOFILE, &before);
  const rlimit none{3, before.rlim_max};
  ::setrlimit(RLIMIT_NOFILE, &none);
  expect(memferry_listener_create("127.0.0.1", 0, &second, &error) == MEMFERRY_SYSTEM &&
             error.system_error == EMFILE,
         "no descriptors", error);
  memferry_destination* destination = nullptr;
  const memferry_destination_options options = destination_options();
  expect(memferry_destination_create(&options, &destination, &error) == MEMFERRY_SYSTEM, "no descriptors",
         error);
  ::setrlimit(RLIMIT_NOFILE, &before);
  memferry_listener_close(first, nullptr);
}

void park_arguments() {
  memferry_error error = blank();
  memferry_region* region = nullptr;
  memferry_region_allocate(64 * memferry_page_size(), &region, nullptr);
  const memferry_named_region named{"memory", region};
  memferry_park* park = nullptr;
  const auto refused = [&](int code, const memferry_park_options& options, const char* what) {
    expect(memferry_park_create(&options, &named, 1, nullptr, 0, &park, &error) == code && !park &&
               error.text[0] != '\0',
           what, error);
  };
  const auto invalid = [&](const memferry_park_options& options, const char* what) {
    refused(MEMFERRY_INVALID_ARGUMENT, options, what);
  };
  const auto with = [](auto field, auto value) {
    memferry_park_options options = park_options();
    options.*field = value;
    return options;
  };
  using Options = memferry_park_options;
  invalid(with(&Options::size, size_t{0}), "a size that is not set");
  invalid(with(&Options::secret_bytes, size_t{3}), "a short secret");
  invalid(with(&Options::server_count, size_t{0}), "no servers");
  invalid(with(&Options::server_count, size_t{251}), "too many servers");
  invalid(with(&Options::servers, nullptr), "NULL servers");
  invalid(with(&Options::guest, nullptr), "no name");
  invalid(with(&Options::guest, ""), "an empty name");
  invalid(with(&Options::description, "{"), "a description that is no JSON");
  invalid(with(&Options::module, "m"), "a module without its hash");
  invalid(with(&Options::replicas, 3U), "three replicas");
  invalid(with(&Options::compress, "gzip"), "an unknown codec");
  invalid(with(&Options::lease_ms, 1U), "a short lease");
  Options stalling = with(&Options::replicas, 2U);
  stalling.stall_timeout_ms = 1000;
  invalid(stalling, "a chain that has no time");
  const std::vector<const char*> twice = {"127.0.0.1:9", "127.0.0.1:9"};
  Options doubled = with(&Options::servers, twice.data());
  doubled.server_count = 2;
  invalid(doubled, "one server twice");
  const char* const name = "localhost:9";
  invalid(with(&Options::servers, &name), "a name");
  const char* const everywhere = "192.0.2.1:9";
  refused(MEMFERRY_PLAINTEXT_REQUIRED, with(&Options::servers, &everywhere), "a server far away");
  refused(MEMFERRY_CONNECT_FAILED, park_options(), "nobody");
  // Its claim on the region is gone.
  refused(MEMFERRY_CONNECT_FAILED, park_options(), "nobody again");
  const Options options = park_options();
  const memferry_named_region same[] = {named, named};
  expect(memferry_park_create(&options, same, 2, nullptr, 0, &park, &error) == MEMFERRY_REGION_BUSY,
         "one region twice", error);
  expect(memferry_park_create(&options, nullptr, 1, nullptr, 0, &park, &error) == MEMFERRY_INVALID_ARGUMENT,
         "no regions", error);
  expect(memferry_park_create(&options, &named, 65, nullptr, 0, &park, &error) == MEMFERRY_INVALID_ARGUMENT,
         "too many regions", error);
  expect(memferry_park_create(&options, &named, 1, nullptr, 4, &park, &error) == MEMFERRY_INVALID_ARGUMENT,
         "no state", error);
  const Options little = with(&Options::max_state_bytes, uint64_t{4});
  expect(memferry_park_create(&little, &named, 1, "state", 5, &park, &error) == MEMFERRY_LIMIT_EXCEEDED,
         "a long state", error);
  expect(memferry_park_evict(nullptr, &error) == MEMFERRY_INVALID_ARGUMENT, "no park", error);
  expect(memferry_park_ticket(nullptr)[0] == '\0', "no ticket", error);
  memferry_region_close(region, nullptr);
}

// The best that works on this kernel may be one that may not watch this memory.
void trackers() {
  memferry_error error = blank();
  const auto bytes = memferry_page_size() * 4;
  const int file = memfd_create("shared", MFD_CLOEXEC);
  expect(file >= 0 && ftruncate(file, static_cast<off_t>(bytes)) == 0, "a memfd", error);
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  void* const other = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  expect(memory != MAP_FAILED && other != MAP_FAILED, "two mappings", error);
  const memferry_extent extent{memory, bytes};
  memferry_region* region = nullptr;
  expect(memferry_region_adopt(&extent, 1, 0, &region, &error) == MEMFERRY_OK, "a region of it", error);
  // Gives the tracker's name, when it has seen a write of page 2 through `written`.
  const auto sees = [&](const memferry_tracker_options* options, void* written) -> std::string {
    memferry_tracker* tracker = nullptr;
    uint64_t dirty[1] = {0};
    expect(memferry_tracker_create_with(region, options, &tracker, &error) == MEMFERRY_OK, "made", error);
    expect(memferry_tracker_arm(tracker, &error) == MEMFERRY_OK, "armed", error);
    volatile unsigned char* const byte = static_cast<unsigned char*>(written) + 2 * memferry_page_size();
    *byte = static_cast<unsigned char>(*byte + 1);
    expect(memferry_tracker_collect(tracker, dirty, 1, nullptr, &error) == MEMFERRY_OK, "collected", error);
    std::string name = (dirty[0] & 4U) != 0 ? memferry_tracker_name(tracker) : "nothing";
    memferry_tracker_close(tracker);
    return name;
  };
  expect(sees(nullptr, other) == "hash-diff", "shared memory: whoever writes", error);
  const memferry_tracker_options word{
      .size = sizeof word, .name = nullptr, .writers = MEMFERRY_WRITERS_TRACKED_MAPPING, .split_huge_pages = 0};
  const std::string cheapest =
      memferry_tracker_check("uffd-wp-async", nullptr) == MEMFERRY_OK ? "uffd-wp-async" : "";
  const std::string given = sees(&word, memory);
  expect(given != "nothing" && (cheapest.empty() || given == cheapest), "on the caller's word", error);
  memferry_tracker_options split = word;
  split.split_huge_pages = 1;
  expect(sees(&split, memory) == given, "what was never sent counts as it was written", error);
  memferry_region_close(region, nullptr);
  munmap(memory, bytes);
  munmap(other, bytes);
  close(file);
}

void arguments() {
  memferry_error error = blank();
  const auto invalid = [&](int code, const char* what) {
    expect(code == MEMFERRY_INVALID_ARGUMENT && error.code == code && error.text[0] != '\0', what, error);
  };
  memferry_region* region = nullptr;
  invalid(memferry_region_allocate(4096, nullptr, &error), "nowhere to write a region");
  expect(memferry_region_allocate(4097, &region, &error) == MEMFERRY_REGION_UNALIGNED, "half a page", error);
  invalid(memferry_region_allocate(0, &region, &error), "an empty region");
  invalid(memferry_region_adopt(nullptr, 1, 0, &region, &error), "no extents");
  memferry_tracker* tracker = nullptr;
  invalid(memferry_tracker_create(nullptr, nullptr, &tracker, &error), "no region");
  invalid(memferry_tracker_check("no-such", &error), "no such tracker");
  memferry_region_allocate(memferry_page_size(), &region, nullptr);
  memferry_tracker_options tracking{};
  invalid(memferry_tracker_create_with(region, &tracking, &tracker, &error), "a size that is not set");
  tracking = {.size = sizeof tracking, .name = "no-such", .writers = 0, .split_huge_pages = 0};
  invalid(memferry_tracker_create_with(region, &tracking, &tracker, &error), "no such tracker");
  tracking = {.size = sizeof tracking, .name = nullptr, .writers = 7, .split_huge_pages = 0};
  invalid(memferry_tracker_create_with(region, &tracking, &tracker, &error), "no such writers");
  tracking = {.size = sizeof tracking, .name = nullptr, .writers = 0, .split_huge_pages = 2};
  invalid(memferry_tracker_create_with(region, &tracking, &tracker, &error), "neither split nor not");
  memferry_region_close(region, nullptr);
  memferry_sender* sender = nullptr;
  invalid(memferry_sender_create(nullptr, &sender, &error), "no options");
  memferry_sender_options sending{};
  invalid(memferry_sender_create(&sending, &sender, &error), "a size that is not set");
  sending.size = sizeof sending;
  invalid(memferry_sender_create(&sending, &sender, &error), "no regions");
  invalid(memferry_sender_start_push(nullptr, &error), "no sender");
  memferry_destination* destination = nullptr;
  memferry_destination_options options = destination_options();
  options.secret_bytes = 3;
  invalid(memferry_destination_create(&options, &destination, &error), "a short secret");
  options = destination_options();
  memferry_destination_callbacks lacking = *options.callbacks;
  lacking.resume = nullptr;
  options.callbacks = &lacking;
  invalid(memferry_destination_create(&options, &destination, &error), "no resume");
  options.callbacks = nullptr;
  invalid(memferry_destination_create(&options, &destination, &error), "no callbacks");
  options = destination_options();
  options.host = "0.0.0.0";
  expect(memferry_destination_create(&options, &destination, &error) == MEMFERRY_PLAINTEXT_REQUIRED,
         "everybody", error);
  options.host = "localhost.example";
  invalid(memferry_destination_create(&options, &destination, &error), "a name");
  // A structure of a newer header: what this library does not know must be zero.
  std::vector<unsigned char> newer(sizeof options + 16);
  options = destination_options();
  options.size = newer.size();
  std::memcpy(newer.data(), &options, sizeof options);
  const auto* wide = reinterpret_cast<const memferry_destination_options*>(newer.data());
  expect(memferry_destination_create(wide, &destination, &error) == MEMFERRY_OK, "a newer header", error);
  memferry_destination_close(destination, nullptr);
  newer.back() = 1;
  invalid(memferry_destination_create(wide, &destination, &error), "a newer field");
  // An error structure of any size, and none.
  memferry_error small = blank();
  small.size = offsetof(memferry_error, text) + 8;
  std::memset(small.text, 'x', sizeof small.text);
  memferry_region_allocate(0, &region, &small);
  expect(std::strlen(small.text) == 7 && small.text[8] == 'x', "a small error", small);
  memferry_region_allocate(0, &region, nullptr);
  expect(std::strcmp(memferry_code_name(-1), "UNKNOWN") == 0 &&
             std::strcmp(memferry_code_name(99), "UNKNOWN") == 0,
         "code names", error);
}

}  // namespace

// A sanitizer has its own, statically: there the linker puts ours before it (--wrap, in CMakeLists.txt).
#if MEMFERRY_TEST_THREADS_CHECKED || MEMFERRY_TEST_ADDRESSES_CHECKED
// NOLINTBEGIN(bugprone-reserved-identifier): the linker's names
extern "C" void* __real__Znwm(std::size_t bytes);
extern "C" void* __wrap__Znwm(std::size_t bytes) {
  if (fails()) throw std::bad_alloc();
  return __real__Znwm(bytes);
}
// NOLINTEND(bugprone-reserved-identifier)
#else
void* operator new(std::size_t bytes) {
  void* const memory = fails() ? nullptr : std::malloc(bytes == 0 ? 1 : bytes);
  if (!memory) throw std::bad_alloc();
  return memory;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
#endif

int main() {
  trackers();
  arguments();
  park_arguments();
  system_calls();
  memory();
  std::printf("%d complaints\n", complaints);
  return complaints == 0 ? 0 : 1;
}
