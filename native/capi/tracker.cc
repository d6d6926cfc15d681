#include <string>

#include "capi/handles.h"
#include "control/failure.h"
#include "page/bitmap.h"

using memferry::AtomicBitmap;
using memferry::TrackerProbe;
using memferry::capi::guarded;
using memferry::capi::read_sized;
using memferry::capi::required;

namespace {

[[noreturn]] void unavailable(const std::string& name, const std::string& reason, const std::string& remedy) {
  throw memferry::control::Failure("TRACKER_UNAVAILABLE",
                                   name + ": " + reason + (remedy.empty() ? "" : "; it needs " + remedy));
}

memferry::TrackerKind kind_named(const char* name) {
  const auto kind = memferry::tracker_kind(name);
  if (!kind) throw std::invalid_argument(std::string("no tracker '") + name + "'");
  return *kind;
}

// The best that works here and may watch this region.
memferry::TrackerKind best_for(const memferry::Region& region, const memferry::TrackerOptions& options) {
  std::string reasons;
  for (const memferry::TrackerKind kind : memferry::tracker_kinds()) {
    const TrackerProbe probe = memferry::probe_tracker(kind);
    const auto refused =
        probe.available ? memferry::tracker_refusal(kind, region, options) : std::optional(probe.reason);
    if (!refused) return kind;
    reasons += probe.name + ": " + *refused + "; ";
  }
  unavailable("no tracker works here", reasons, "");
}

memferry::Writers writers_of(std::int32_t writers) {
  switch (writers) {
    case MEMFERRY_WRITERS_ANYWHERE:
      return memferry::Writers::kAnywhere;
    case MEMFERRY_WRITERS_TRACKED_MAPPING:
      return memferry::Writers::kTrackedMapping;
    default:
      throw std::invalid_argument("writers: there is no " + std::to_string(writers));
  }
}

}  // namespace

extern "C" {

int memferry_tracker_check(const char* name, memferry_error* why_not) {
  return guarded(why_not, [&] {
    const TrackerProbe probe = memferry::probe_tracker(kind_named(&required(name, "name")));
    if (!probe.available) unavailable(probe.name, probe.reason, probe.remedy);
  });
}

int memferry_tracker_create(memferry_region* region, const char* name, memferry_tracker** tracker,
                            memferry_error* error) {
  const memferry_tracker_options options{
      .size = sizeof options, .name = name, .writers = MEMFERRY_WRITERS_ANYWHERE, .split_huge_pages = 0};
  return memferry_tracker_create_with(region, &options, tracker, error);
}

int memferry_tracker_create_with(memferry_region* region, const memferry_tracker_options* options,
                                 memferry_tracker** tracker, memferry_error* error) {
  return guarded(error, [&] {
    required(tracker, "tracker") = nullptr;
    const memferry_tracker_options given =
        options ? read_sized(options, "options") : memferry_tracker_options{};
    if (given.split_huge_pages > 1) throw std::invalid_argument("options: split_huge_pages is 0 or 1");
    const memferry::TrackerOptions how{.writers = writers_of(given.writers),
                                       .split_huge_pages = given.split_huge_pages == 1};
    auto made = std::make_unique<memferry_tracker>();
    made->region = required(region, "region").region;
    made->tracker = memferry::make_tracker(given.name ? kind_named(given.name) : best_for(*made->region, how),
                                           made->region, how);
    *tracker = made.release();
  });
}

const char* memferry_tracker_name(const memferry_tracker* tracker) {
  // Names are literals.
  return tracker ? tracker->tracker->name().data() : "";
}

int memferry_tracker_arm(memferry_tracker* tracker, memferry_error* error) {
  return guarded(error, [&] { required(tracker, "tracker").tracker->arm(); });
}

int memferry_tracker_collect(memferry_tracker* tracker, uint64_t* bitmap, size_t words,
                             uint64_t* pages_written, memferry_error* error) {
  return guarded(error, [&] {
    memferry_tracker& of = required(tracker, "tracker");
    uint64_t* const out = &required(bitmap, "bitmap");
    const std::uint64_t capacity = of.region->capacity_pages();
    // All that it may become: it may grow meanwhile, and what is collected once is not told again.
    if (words < (capacity + 63) / 64)
      throw std::invalid_argument("bitmap: fewer words than the region's capacity has pages for");
    AtomicBitmap dirty(capacity);
    const std::uint64_t count = of.tracker->collect(dirty);
    for (std::uint64_t i = 0; i < dirty.words(); ++i) out[i] |= dirty.word(i);
    if (pages_written) *pages_written = count;
  });
}

int memferry_tracker_disarm(memferry_tracker* tracker, memferry_error* error) {
  return guarded(error, [&] { required(tracker, "tracker").tracker->disarm(); });
}

void memferry_tracker_close(memferry_tracker* tracker) { delete tracker; }

}  // extern "C"
