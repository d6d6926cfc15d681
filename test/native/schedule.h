// A schedule of scatters: which guests go which way through which servers, and what goes wrong when. All of it comes
// from one number, by pure code, so that a number is a test.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "transfer/scatter.h"
#include "wire/codec_choice.h"
#include "wire/frame.h"

namespace memferry::test {

struct Schedule {
  enum class Way : std::uint8_t {
    kScatter,         // pause, switch, push
    kScatterHybrid,   // some rounds first
    kScatterPreCopy,  // rounds to the end; the destination gathers everything before it takes over
    kPark,            // to the servers alone; who gathers comes when the source has gone
  };
  static constexpr std::size_t kWays = 4;

  enum class FaultKind : std::uint8_t {
    kServerKilled,
    kServerRestarted,    // empty, on the same port
    kServerSilent,       // for good
    kServerPauses,       // for a moment
    kServerCut,          // all of its connections, once
    kServerSmall,        // has little memory, from the start
    kServerWrong,        // other bytes in place of some pages
    kServerFlips,        // one bit, in what it is sent or in what it answers
    kDirectCut,          // the connections of source and destination, once
    kDirectPauses,       // for a while
    kDirectFlips,        // one bit
    kSourceKilled,       // before it is evicted
    kSourceKilledAfter,  // right after it is evicted
    kDestinationClosed,  // in the middle
  };
  static constexpr std::size_t kFaultKinds = 14;

  enum class When : std::uint8_t {
    kStart,         // before anything is connected
    kConnected,     // when the source is
    kSent,          // so many permille of the guest's pages sent
    kAcknowledged,  // or held by somebody, as the source knows
    kGathered,      // or gathered
    kBeforeSwitch,  // the guest has been paused
    kSwitched,      // nothing has been pushed yet; pre-copy: all has been sent, not all has been gathered
    kEvicted,  // the source has just said so; pre-copy: the destination has taken over; park: nobody gathers yet
  };
  static constexpr std::size_t kWhens = 8;
  static constexpr unsigned kIndexServers = Scatter::kIndexServers;

  struct Fault {
    FaultKind kind{};
    When when{};
    unsigned permille = 0;
    unsigned guest = 0;   // whose progress counts, and who is meant
    unsigned server = 0;  // where one is meant
    unsigned amount = 0;  // milliseconds, pages
    bool up = false;      // of a flip: on the way to the server or destination
  };
  struct Guest {
    std::vector<std::uint64_t> region_pages;
    unsigned channels = 1;
    std::uint64_t send_limit = 0;    // bytes/s; 0: none
    std::uint64_t intake_limit = 0;  // of the destination's direct connections
    std::uint64_t gather_limit = 0;
    unsigned hurry_ms = 0;  // after which the three are lifted
    bool release_as_evicted = false;
    bool paging_from_start = false;
    bool write_tracker = false;  // the kernel's write protection instead of hashes, where there is such
    unsigned rounds = 1;
    unsigned discards = 0;
    unsigned touchers = 1;
    unsigned touch_every_us = 100;
    wire::Compress compress = wire::Compress::kOff;
    std::uint64_t delta_cache = 0;
    std::uint16_t encodings() const {
      std::uint16_t agreed = compress == wire::Compress::kOff ? std::uint16_t{0} : wire::kCompressions;
      if (delta_cache > 0) agreed |= wire::kFlagDelta;
      return agreed;
    }
    unsigned alike = 0;  // permille of its pages that other guests have too
    std::uint64_t pages() const {
      std::uint64_t all = 0;
      for (const std::uint64_t each : region_pages) all += each;
      return all;
    }
  };

  std::uint64_t seed = 0;
  Way way{};
  unsigned servers = 1;
  unsigned replicas = 1;
  bool dedup = false;  // its guests are of one deduplication domain
  bool audit = false;  // read every server's pages when a source says that it is evicted
  std::vector<Guest> guests;
  std::vector<Fault> faults;

  static Schedule of(std::uint64_t seed);
  [[nodiscard]] std::string line() const;
  // Whether it is in there at all.
  [[nodiscard]] bool has(FaultKind kind) const {
    return std::any_of(faults.begin(), faults.end(), [&](const Fault& each) { return each.kind == kind; });
  }
};

inline const char* name_of(Schedule::Way way) {
  constexpr std::array<const char*, Schedule::kWays> kNames{"scatter", "scatter-hybrid", "scatter-pre-copy",
                                                            "park"};
  return kNames[static_cast<std::size_t>(way)];
}

inline const char* name_of(Schedule::FaultKind kind) {
  constexpr std::array<const char*, Schedule::kFaultKinds> kNames{
      "server-killed", "server-restarted", "server-silent",       "server-pauses",     "server-cut",
      "server-small",  "server-wrong",     "server-flips",        "direct-cut",        "direct-pauses",
      "direct-flips",  "source-killed",    "source-killed-after", "destination-closed"};
  return kNames[static_cast<std::size_t>(kind)];
}

inline const char* name_of(Schedule::When when) {
  constexpr std::array<const char*, Schedule::kWhens> kNames{
      "start", "connected", "sent", "acknowledged", "gathered", "before-switch", "switched", "evicted"};
  return kNames[static_cast<std::size_t>(when)];
}

inline bool about_server(Schedule::FaultKind kind) { return kind <= Schedule::FaultKind::kServerFlips; }

// What there can be on this way at all.
inline bool possible(Schedule::Way way, Schedule::FaultKind kind) {
  using enum Schedule::FaultKind;
  if (way != Schedule::Way::kPark) return true;
  // No source is connected to a destination; and a parked image's own map is all that its destination knows, so a
  // server that writes pages of its own would be believed.
  return kind != kDirectCut && kind != kDirectPauses && kind != kDirectFlips && kind != kServerWrong &&
         kind != kSourceKilledAfter;
}

inline Schedule Schedule::of(std::uint64_t seed) {
  // Not a distribution of the standard library: those differ between libraries, a seed may not.
  std::mt19937_64 random(seed);
  const auto below = [&](std::uint64_t bound) { return random() % bound; };
  const auto one_in = [&](std::uint64_t bound) { return random() % bound == 0; };
  const auto number = [&](std::uint64_t from, std::uint64_t to) {
    return static_cast<unsigned>(from + below(to - from + 1));
  };

  Schedule made;
  made.seed = seed;
  made.way = static_cast<Way>(seed % kWays);
  made.servers = number(1, 4);
  made.replicas = one_in(2) ? 2 : 1;
  made.audit = one_in(3);
  const std::array<unsigned, 6> crowd{1, 1, 1, 2, 2, 3};
  const unsigned guests = crowd[below(crowd.size())];
  const auto limit = [&]() -> std::uint64_t { return one_in(4) ? 0 : 1ULL << number(19, 25); };
  for (unsigned i = 0; i < guests; ++i) {
    Guest guest;
    const unsigned regions = one_in(4) ? 2 : 1;
    for (unsigned region = 0; region < regions; ++region) {
      const std::uint64_t least = 64ULL << below(4);
      guest.region_pages.push_back(least + below(least + 1));
    }
    guest.channels = number(1, 2);
    guest.send_limit = one_in(3) ? 1ULL << number(22, 26) : 0;
    guest.intake_limit = limit();
    guest.gather_limit = limit();
    guest.hurry_ms = one_in(2) ? number(0, 40) : number(40, 400);
    guest.release_as_evicted = (made.way == Way::kScatter || made.way == Way::kScatterHybrid) && one_in(3);
    guest.paging_from_start = made.way == Way::kScatter && one_in(2);
    guest.write_tracker = one_in(2);
    guest.rounds = number(1, 3);
    guest.discards = number(0, 2);
    guest.touchers = number(1, 2);
    guest.touch_every_us = 100U << below(4);
    made.guests.push_back(std::move(guest));
  }

  const std::array<unsigned, 8> bad_days{0, 1, 1, 1, 2, 2, 3, 3};
  const unsigned faults = bad_days[below(bad_days.size())];
  while (made.faults.size() < faults) {
    Fault fault;
    fault.kind = static_cast<FaultKind>(below(kFaultKinds));
    // One that is silent for good takes seconds to find out.
    if (fault.kind == FaultKind::kServerSilent && !one_in(4)) fault.kind = FaultKind::kServerKilled;
    if (!possible(made.way, fault.kind)) continue;
    fault.guest = number(0, guests - 1);
    fault.server = number(0, made.servers - 1);
    fault.permille = number(0, 900);
    fault.up = one_in(2);
    fault.when = static_cast<When>(1 + below(kWhens - 1));
    switch (fault.kind) {
      case FaultKind::kServerSmall:
        fault.when = When::kStart;
        fault.amount = number(0, 200);
        break;
      case FaultKind::kServerPauses:
        fault.amount = number(5, 120);
        break;
      case FaultKind::kDirectPauses:
        fault.amount = number(50, 700);
        break;
      case FaultKind::kServerWrong:
        fault.amount = number(1, 6);
        break;
      case FaultKind::kSourceKilled:
        if (fault.when == When::kEvicted || fault.when == When::kGathered) fault.when = When::kAcknowledged;
        break;
      case FaultKind::kSourceKilledAfter:
        fault.when = When::kEvicted;
        break;
      default:
        break;
    }
    made.faults.push_back(fault);
  }
  // Last, so that the rest of a seed's schedule is what it always was.
  made.dedup = (made.way == Way::kScatter || made.way == Way::kScatterHybrid) && one_in(2);
  for (Guest& guest : made.guests) {
    guest.alike = 300 * number(0, 3);
    if (!made.dedup || one_in(4)) continue;
    // Else these few pages are sent before anybody could look at them, and not to the servers.
    guest.send_limit = 1ULL << number(20, 23);
    guest.intake_limit = 1ULL << number(16, 19);
    guest.hurry_ms = number(100, 500);
  }
  // Last, so that a seed's schedule is otherwise what it was before there were encodings.
  for (Guest& guest : made.guests) {
    guest.compress = static_cast<wire::Compress>(below(4));
    guest.delta_cache = one_in(2) ? 4096 * number(1, 600) : 0;
  }
  // Last, so that a seed's schedule is otherwise what it was before rounds and parks were deduplicated.
  if (made.way == Way::kScatterPreCopy || made.way == Way::kPark) {
    made.dedup = one_in(2);
    for (Guest& guest : made.guests) {
      if (!made.dedup || one_in(4)) continue;
      guest.send_limit = 1ULL << number(20, 23);
      guest.intake_limit = 1ULL << number(16, 19);
      guest.hurry_ms = number(100, 500);
    }
  }
  // Last, so that a seed's schedule is otherwise what it was when all servers had the map.
  if (one_in(8)) {
    made.servers = number(kIndexServers + 1, kIndexServers + 2);
    const bool without_map = one_in(2);
    for (unsigned server = 0; without_map && server < kIndexServers; ++server) {
      Fault fault;
      fault.kind = one_in(2) ? FaultKind::kServerKilled : FaultKind::kServerRestarted;
      fault.when = When::kAcknowledged;
      fault.permille = number(0, 600);
      fault.guest = number(0, guests - 1);
      fault.server = server;
      made.faults.push_back(fault);
    }
  }
  return made;
}

inline std::string Schedule::line() const {
  std::string text = "seed " + std::to_string(seed) + ": " + name_of(way) + ", " + std::to_string(servers) +
                     " servers, replicas " + std::to_string(replicas) + (audit ? ", audit" : "") +
                     (dedup ? ", dedup" : "");
  for (const Guest& guest : guests) {
    text += "; guest";
    for (const std::uint64_t pages : guest.region_pages) text += " " + std::to_string(pages);
    text += " pages, " + std::to_string(guest.channels) + " channels, KiB/s " +
            std::to_string(guest.send_limit >> 10) + "/" + std::to_string(guest.intake_limit >> 10) + "/" +
            std::to_string(guest.gather_limit >> 10) + " for " + std::to_string(guest.hurry_ms) + " ms, " +
            std::to_string(guest.rounds) + "+" + std::to_string(guest.discards) + " rounds" +
            (guest.release_as_evicted ? ", releases" : "") +
            (guest.paging_from_start ? ", pages at once" : "") +
            (guest.write_tracker ? ", write tracker" : "") + ", alike " + std::to_string(guest.alike) +
            ", compress " + std::to_string(static_cast<int>(guest.compress)) + ", delta cache " +
            std::to_string(guest.delta_cache >> 10);
  }
  for (const Fault& fault : faults) {
    text += std::string("; ") + name_of(fault.kind);
    if (about_server(fault.kind)) text += " s" + std::to_string(fault.server);
    if (fault.amount > 0) text += " (" + std::to_string(fault.amount) + ")";
    text += std::string(" at ") + name_of(fault.when);
    if (fault.when == When::kSent || fault.when == When::kAcknowledged || fault.when == When::kGathered)
      text += " " + std::to_string(fault.permille) + "/1000";
    text += " of g" + std::to_string(fault.guest);
    if (fault.kind == FaultKind::kServerFlips || fault.kind == FaultKind::kDirectFlips)
      text += fault.up ? " up" : " down";
  }
  return text;
}

}  // namespace memferry::test
