// Paging into reserved huge pages: see fault/huge_memory.h for how one is put together. The faults that wait for one are
// kept under its first page.
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <string>

#include "fault/pager.h"
#include "os/pagemap.h"
#include "os/sys_error.h"

namespace memferry {
namespace {

// Until a huge page that has not come in full is asked for once more, what is missing of it then. A source answers with
// what is in one piece and not under way already, so that little comes twice; a server with all that it is asked for.
constexpr std::chrono::milliseconds kAgainAtSource{20};
constexpr std::chrono::milliseconds kAgainElsewhere{100};

}  // namespace

std::chrono::milliseconds Pager::again_of_huge() const { return router_ ? kAgainElsewhere : kAgainAtSource; }

// Missing or not yet mapped is the same here: it is either whole, or waited for.
void Pager::on_huge_fault(std::uint32_t region, PageNumber page, Clock::time_point now,
                          std::vector<Request>& requests) {
  const ArrivalMap& map = *maps_[region];
  const HugeMemory& huge = *huge_[region];
  const PageRun unit = huge.unit(page);
  bool whole = false;
  bool poisoned = false;
  {
    // Under this lock settle_huge() looks who waits: either it sees this entry, or we see that it is whole.
    const std::lock_guard lock(mutex_);
    whole = huge.whole(page);
    const bool lost = map.lost.count(unit) > 0;
    const bool arriving = !lost && map.received.count(unit) == unit.count;
    // Reported first, poisoned then: until that whoever touches it waits.
    poisoned = !whole && !arriving && (poisoning_ || map.poisoned.count(unit) > 0);
    if (!whole && !poisoned && !waiting_.contains(region, unit.first)) {
      WaitingFault fault;
      fault.region = region;
      fault.page = unit.first;
      fault.window = unit.count;
      fault.seen = now;
      if (lost || arriving) {
        fault.state = WaitingFault::State::kArriving;
      } else {
        note_kind({}, now);
        fault.again = again_of_huge();
        if (online_ || router_) {
          fault.state = WaitingFault::State::kExpected;
          fault.due = now + fault.again;
          fault.remote = true;
          fault.at_source = !router_;
          fault.asked = now;
          requests.push_back({.region = region, .run = unit, .huge = true});
        }
      }
      waiting_.add(fault);
    } else if (!whole && !poisoned) {
      waiting_.wanted(region, unit.first, now);
    }
  }
  if (whole) (void)map_huge(region, unit, Patience::kOwnThread);
  if (poisoned) poison_huge(region, unit, Patience::kOwnThread);
}

// What is missing of a huge page, in as many requests as that takes.
void Pager::send_huge(const Request& request) {
  const ArrivalMap& map = *maps_[request.region];
  bool online = false;
  std::uint64_t asked = 0;
  std::uint64_t rerouted = 0;
  {
    const std::lock_guard lock(mutex_);
    online = online_;
    asked = asked_again_;
    rerouted = rerouted_;
    // Before it can be answered, and taken back where it turns out otherwise.
    if (online) waiting_.set_at_source(request.region, request.run.first, true);
  }
  bool at_source = false;
  bool elsewhere = false;
  bool nobody = false;
  for (PageNumber from = request.run.first;;) {
    const auto lacking = map.received.next_clear(from, request.run.end(), kMostAtOnce);
    if (!lacking) break;
    from = lacking->end();
    // Of a huge page much may be elsewhere and much not: it is asked for in one place.
    const Route route =
        router_ ? router_({.region = request.region, .run = *lacking, .source_online = online, .huge = true})
                : Route::kSource;
    at_source = at_source || route == Route::kSource;
    elsewhere = elsewhere || route == Route::kSent;
    nobody = nobody || route == Route::kNobody;
    if (route != Route::kSource) continue;
    wire::FrameHeader header = wire::make_header(wire::FrameType::kFaultRequest, request.region, *lacking);
    wire::seal(header);
    // What a cut swallows is asked for again by set_online().
    if (!writer_.send(header)) break;
  }
  if (!router_) return;
  const std::lock_guard lock(mutex_);
  if (!at_source) waiting_.set_at_source(request.region, request.run.first, false);
  // What has changed while the router was asked may be what this request needs.
  const bool changed = (nobody && asked != asked_again_) || (elsewhere && rerouted != rerouted_);
  // Else it is asked for again in a moment, if only because that is due.
  if (!changed && !(nobody && !at_source && !elsewhere)) return;
  waiting_.defer(request.region, request.run.first);
  if (changed) thread_.wake();
}

Pager::Installed Pager::install_huge(std::uint32_t region, PageRun run, const std::byte* bytes) {
  const HugeMemory& huge = *huge_[region];
  Installed result;
  for (PageRun left = run; left.count > 0 && result.intact;) {
    const PageRun part{left.first,
                       std::min(left.count, huge.unit(left.first).end().value - left.first.value)};
    result.intact = install_in_unit(region, part, bytes, result);
    if (bytes != nullptr) bytes += part.count * maps_[region]->page_size();
    left = {part.end(), left.count - part.count};
  }
  return result;
}

bool Pager::install_in_unit(std::uint32_t region, PageRun run, const std::byte* bytes, Installed& result) {
  ArrivalMap& map = *maps_[region];
  bool whole = false;
  for (std::uint64_t page = run.first.value; page < run.end().value;) {
    if (map.received.set(PageNumber{page})) {
      ++page;
      continue;
    }
    const std::uint64_t first = page++;
    bool more = true;
    while (page < run.end().value && (more = !map.received.set(PageNumber{page}))) ++page;
    const PageRun claimed{PageNumber{first}, page - first};
    const Landed landed = land_in_unit(
        region, claimed, bytes != nullptr ? bytes + (first - run.first.value) * map.page_size() : nullptr);
    if (landed == Landed::kNoMemory) {
      map.zero.clear_run(claimed);
      map.received.clear_run(claimed);
      break_off("SYSTEM", "no memory for a huge page");
      return false;
    }
    result.pages += claimed.count;
    whole = landed == Landed::kWhole;
    if (!more) ++page;
  }
  return !whole || settle_huge(region, huge_[region]->unit(run.first));
}

// What the owner has discarded meanwhile becomes zeros: before its discard it is dropped by that, after it it is known.
Pager::Landed Pager::land_in_unit(std::uint32_t region, PageRun claimed, const std::byte* bytes) {
  ArrivalMap& map = *maps_[region];
  HugeMemory& huge = *huge_[region];
  const AtomicBitmap* const removed = attached_[region].removed.get();
  const auto sharing = share_layout(region);
  if (bytes == nullptr) map.zero.set_run(claimed);
  for (PageRun left = claimed; left.count > 0;) {
    const PageRun part = removed != nullptr ? removed->alike(left) : left;
    const bool zeros = bytes == nullptr || (removed != nullptr && removed->test(part.first));
    if (!(zeros ? huge.write_zeros(part)
                : huge.write(part, bytes + (part.first.value - claimed.first.value) * map.page_size())))
      return Landed::kNoMemory;
    left = {part.end(), left.count - part.count};
  }
  return huge.land(claimed) ? Landed::kWhole : Landed::kPart;
}

// It is whole. Zeros that nobody waits for need no memory, as elsewhere: they are mapped when they are touched, or are
// ordinary memory by then.
bool Pager::settle_huge(std::uint32_t region, PageRun unit) {
  const Clock::time_point now = Clock::now();
  bool waited_for = false;
  {
    const std::lock_guard lock(mutex_);
    waiting_.take(region, {unit.first, 1}, [&](const WaitingFault& fault) {
      if (fault.remote) latencies_.record(now - fault.seen);
      waited_for = !fault.probe;
    });
  }
  return (!waited_for && !huge_[region]->has_content(unit.first)) || map_huge(region, unit, Patience::kWaits);
}

// Gives a whole one to the region's mapping, and wakes its waiters.
bool Pager::map_huge(std::uint32_t region, PageRun unit, Patience patience) {
  ArrivalMap& map = *maps_[region];
  HugeMemory& huge = *huge_[region];
  const OwnerAddress address = map.region().owner_address(unit.first);
  Userfaultfd& uffd = uffd_of(region);
  std::string why = "a huge page cannot be mapped";
  bool gone = false;
  for (int tries = 0;;) {
    PageResult result;
    {
      // Not while it is waited for an event to be read: who reads them may want this lock first.
      const std::lock_guard mapping(huge.mapping());
      if (!huge.whole(unit.first)) return true;  // taken back
      if (!huge.populate(unit.first)) {
        why = "no memory for a huge page";
        break;
      }
      try {
        result = huge.give(uffd, unit.first);
        if (result.outcome == PageOutcome::kExists) uffd.wake(address, huge.unit_bytes());
      } catch (const SystemError& error) {
        if (huge.failed(unit.first)) return true;
        why = error.what();
        break;
      }
      if (result.outcome == PageOutcome::kOk || result.outcome == PageOutcome::kExists) {
        if (!huge.failed(unit.first)) map.present.set_run(unit);
        return true;
      }
    }
    if (result.outcome == PageOutcome::kGone) {
      if (letting_go_.load()) return true;
      gone = true;
      break;
    }
    if (patience == Patience::kOwnThread && result.error == EAGAIN) {
      raise_again(region, unit.first);
      return true;
    }
    if (result.outcome == PageOutcome::kNoMemory) why = "no memory for a huge page";
    // EFAULT: the guest has cut it out of the file.
    if (!wait_again(tries)) break;
  }
  // Missing again, so that it is poisoned and waited for no more.
  map.received.clear_run(unit);
  if (gone) {
    break_off_gone(region);
  } else {
    break_off("SYSTEM", why);
  }
  return false;
}

// Of what is lost the rest of the huge page is lost with it; a whole one is the guest's.
void Pager::poison_huge(std::uint32_t region, PageRun run, Patience patience) {
  HugeMemory& huge = *huge_[region];
  for (PageNumber at = run.first; at < run.end();) {
    const PageRun unit = huge.unit(at);
    at = unit.end();
    const bool lost = maps_[region]->received.count(unit) < unit.count || maps_[region]->lost.count(unit) > 0;
    if (!lost && huge.whole(unit.first)) continue;
    if (huge.set_failed(unit.first)) {
      raise_again(region, unit.first);
    } else {
      const Poisoned outcome = poison_unit(region, unit, patience);
      if (outcome == Poisoned::kCannot) make_failing(region, unit);
      if (outcome == Poisoned::kAgain) {
        huge.clear_failed(unit.first);
        raise_again(region, unit.first);
        continue;
      }
    }
    const std::lock_guard lock(mutex_);
    waiting_.take(region, {unit.first, 1}, [](const WaitingFault&) {});
  }
}

// kCannot when the kernel cannot do it (before Linux 6.6), or does not.
Pager::Poisoned Pager::poison_unit(std::uint32_t region, PageRun unit, Patience patience) {
  Userfaultfd& uffd = uffd_of(region);
  if ((uffd.features() & abi::kUffdFeaturePoison) == 0) return Poisoned::kCannot;
  // Whoever sends another process's memory on has to see that it was poisoned, which the older way does not show of huge
  // pages (Linux 6.6).
  static const bool seen = Pagemap(1).can_scan();
  if (!seen && maps_[region]->region().owner()) return Poisoned::kCannot;
  HugeMemory& huge = *huge_[region];
  const OwnerAddress address = maps_[region]->region().owner_address(unit.first);
  for (int tries = 0;;) {
    try {
      const PageResult result = uffd.poison(address, huge.unit_bytes(), true);
      if (result.outcome == PageOutcome::kOk) return Poisoned::kDone;
      if (result.outcome == PageOutcome::kGone) {
        const bool gone = letting_go_.load() || result.error == ESRCH || !mapped_alike(region, unit).there;
        return gone ? Poisoned::kDone : Poisoned::kCannot;
      }
      if (result.outcome == PageOutcome::kAgain && patience == Patience::kOwnThread) return Poisoned::kAgain;
      // Mapped by whoever broke the rules.
      if (result.outcome == PageOutcome::kExists) huge.unmap(unit);
    } catch (const OwnerGone&) {
      return Poisoned::kDone;
    } catch (const SystemError&) {
      return Poisoned::kCannot;
    }
    if (!wait_again(tries)) return Poisoned::kCannot;
  }
}

std::uint64_t Pager::extra_bytes() const {
  std::uint64_t bytes = 0;
  for (const auto& each : huge_) bytes += each ? each->extra_bytes() : 0;
  return bytes;
}

}  // namespace memferry
