#include <string>

#include "capi/handles.h"
#include "control/failure.h"
#include "page/bitmap.h"

using memferry::AtomicBitmap;
using memferry::TrackerProbe;
using memferry::capi::guarded;
using memferry::capi::required;

namespace {

[[noreturn]] void unavailable(const std::string& name, const std::string& reason, const std::string& remedy) {
  throw memferry::control::Failure("TRACKER_UNAVAILABLE",
                                   name + ": " + reason + (remedy.empty() ? "" : "; it needs " + remedy));
}

// The best that works, or the one of this name; throws where it does not.
memferry::TrackerKind kind_of(const char* name) {
  if (name && !memferry::tracker_kind(name))
    throw std::invalid_argument(std::string("no tracker '") + name + "'");
  std::string reasons;
  for (const TrackerProbe& probe : memferry::probe_trackers()) {
    if (name && probe.name != name) continue;
    if (probe.available) return *memferry::tracker_kind(probe.name);
    if (name) unavailable(probe.name, probe.reason, probe.remedy);
    reasons += probe.name + ": " + probe.reason + "; ";
  }
  unavailable(name ? name : "no tracker works here", reasons, "");
}

}  // namespace

extern "C" {

int memferry_tracker_check(const char* name, memferry_error* why_not) {
  return guarded(why_not, [&] { (void)kind_of(&required(name, "name")); });
}

int memferry_tracker_create(memferry_region* region, const char* name, memferry_tracker** tracker,
                            memferry_error* error) {
  return guarded(error, [&] {
    required(tracker, "tracker") = nullptr;
    auto made = std::make_unique<memferry_tracker>();
    made->region = required(region, "region").region;
    // One that was named is not tried out: arming it says what is wrong.
    const auto named = name ? memferry::tracker_kind(name) : std::nullopt;
    made->tracker = memferry::make_tracker(named ? *named : kind_of(name), made->region);
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
