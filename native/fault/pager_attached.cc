// Paging the memory of another process, by its own userfaultfd.
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <string>
#include <vector>

#include "fault/pager.h"
#include "os/mapping.h"
#include "os/process_maps.h"
#include "os/sys_error.h"

namespace memferry {
namespace {

// What a room's pages are installed in: as large as UFFDIO_COPY is good for, small enough for a fault to come between.
constexpr std::uint64_t kDeliverPages = 64;

constexpr int kLetGoFirst = 1000;

// While one of these is read nothing is installed: what a child lacks is what is missing when its fork's event is.
constexpr std::uint64_t kLayoutEvents = UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_FORK;

// What the kernel shows of the owner's mappings says whose the userfaultfd is: one of a third process would register that
// one's memory, at the same addresses.
void check_registered(Region& memory) {
  std::uint64_t found = 0;
  for_each_paged_area(
      [&](OwnerAddress start, OwnerAddress end) {
        memory.for_each_run_between(start, end,
                                    [&](PageRun run) { found += run.count * memory.page_size(); });
      },
      memory.owner().get());
  if (found == memory.bytes()) return;
  for (const Extent& extent : memory.extents()) (void)memory.uffd()->unregister(extent.start, extent.bytes);
  throw std::invalid_argument("the userfaultfd is not of the process that owns the memory");
}

}  // namespace

// Registered before anything of it is there: who touches it at its owner's waits, and populates nothing.
void Pager::take_attached() {
  for (std::uint32_t region = 0; region < maps_.size(); ++region) {
    const ArrivalMap& map = *maps_[region];
    Region& memory = map.region();
    if (!memory.owner()) continue;
    if (memory.uffd() == nullptr) {
      throw std::invalid_argument("memory of another process can only be paged by a userfaultfd of its own");
    }
    Attached& own = attached_[region];
    if (!memory.begin_events()) throw std::invalid_argument("another pager has this memory's userfaultfd");
    own.events = true;
    if ((memory.uffd()->enabled() & kLayoutEvents) != 0)
      own.removed = std::make_unique<AtomicBitmap>(memory.capacity_pages());
    if (memory.remote()) own.room = std::make_unique<AtomicBitmap>(memory.capacity_pages());
    memory.check_attached("page");
    register_memory(region);
    check_registered(memory);
  }
}

void Pager::unregister_attached() {
  for (std::uint32_t region = 0; region < maps_.size(); ++region) {
    if (!attached_[region].events) continue;
    for (const Extent& extent : maps_[region]->region().extents()) {
      try {
        (void)uffd_of(region).unregister(extent.start, extent.bytes);
      } catch (const SystemError&) {
        // Not registered; or moved, or mapped anew since.
      }
    }
  }
}

void Pager::let_go_attached() {
  for (std::uint32_t region = 0; region < maps_.size(); ++region) {
    if (attached_[region].events) maps_[region]->region().end_events(Region::Missing::kNone);
    attached_[region].events = false;
  }
}

// Events that were read before this pager had them are raised again by waking whoever waits.
void Pager::serve_attached() {
  bool rooms = false;
  for (std::uint32_t region = 0; region < maps_.size(); ++region) {
    ArrivalMap& map = *maps_[region];
    if (!map.region().owner()) continue;
    if (AtomicBitmap* const room = attached_[region].room.get()) {
      for (PageNumber from{0};;) {
        const auto run = map.present.next_set(from, PageNumber{map.pages()}, map.pages());
        if (!run) break;
        from = run->end();
        // On their way from here, like what a channel has claimed.
        for (PageNumber page = run->first; page < run->end(); ++page.value) {
          if (map.received.test(page) && !map.zero.test(page) && !room->set(page)) ++undelivered_;
        }
        map.present.clear_run(*run);
        rooms = true;
      }
    }
  }
  serving_.store(true, std::memory_order_release);
  for (std::uint32_t region = 0; region < maps_.size(); ++region) {
    const ArrivalMap& map = *maps_[region];
    if (!map.region().owner()) continue;
    map.for_each_run({PageNumber{0}, map.pages()}, [&](PageRun part) {
      uffd_of(region).wake(map.region().owner_address(part.first), part.count * map.page_size());
    });
  }
  if (rooms) {
    deliverer_.start("mf-deliver", [this](WorkerThread& self) {
      for (std::uint32_t region = 0; region < maps_.size(); ++region) {
        AtomicBitmap* const room = attached_[region].room.get();
        const PageNumber end{maps_[region]->pages()};
        PageNumber from{0};
        while (room != nullptr && !self.stopping()) {
          const auto run = room->take_run(from, end, kDeliverPages);
          if (!run || deliver_run(region, *run) != Copied::kAll) break;
          from = run->end();
        }
      }
    });
  }
}

// One part by itself for kOwnThread: then kAgain means that nothing was done.
Pager::Copied Pager::deliver_run(std::uint32_t region, PageRun run, Patience patience) {
  const ArrivalMap& map = *maps_[region];
  Copied outcome = Copied::kAll;
  map.for_each_part(run, [&](std::span<std::byte> part, PageNumber first) {
    const std::uint64_t pages = part.size() / map.page_size();
    if (outcome == Copied::kAll) outcome = copy_with(region, {first, pages}, part.data(), patience);
    if (outcome == Copied::kAgain) return;
    // What failed, and what follows it, is missing again, so that it is poisoned and not read.
    if (outcome == Copied::kAll) {
      // As it leaves: the room is never needed twice.
      (void)::madvise(part.data(), part.size(), MADV_DONTNEED);
    } else {
      for (PageNumber page = first; page.value < first.value + pages; ++page.value) {
        if (!map.present.test(page)) (void)maps_[region]->received.clear(page);
      }
    }
    undelivered_.fetch_sub(pages);
  });
  return outcome;
}

// What the deliverer has not taken yet, and then the deliverer itself. What the faults' thread has taken may come back.
void Pager::deliver_all() {
  int tries = 0;
  while (undelivered_.load() > 0 && !broken_once_.load()) {
    for (std::uint32_t region = 0; region < maps_.size(); ++region) {
      AtomicBitmap* const room = attached_[region].room.get();
      const PageNumber end{maps_[region]->pages()};
      PageNumber from{0};
      while (room != nullptr) {
        const auto run = room->take_run(from, end, kDeliverPages);
        if (!run || deliver_run(region, *run) != Copied::kAll) break;
        from = run->end();
        tries = 0;
      }
    }
    if (undelivered_.load() > 0 && !wait_again(tries))
      break_off("SYSTEM", "pages that have come cannot be installed");
  }
  deliverer_.stop();
}

// What lies in waiting rooms and will not be brought any more counts as missing, and fails.
void Pager::give_up_rooms() {
  for (std::uint32_t region = 0; region < maps_.size(); ++region) {
    AtomicBitmap* const room = attached_[region].room.get();
    while (room != nullptr) {
      const auto run = room->take_run(PageNumber{0}, PageNumber{maps_[region]->pages()}, kDeliverPages);
      if (!run) break;
      maps_[region]->received.clear_run(*run);
      undelivered_.fetch_sub(run->count);
      poison(region, *run);
    }
  }
}

bool Pager::deliver() {
  serve();
  deliver_all();
  if (broken_once_.load()) return false;
  finish();
  return true;
}

// The caller holds layout_ whole where removals are told of.
void Pager::on_event(const uffd_msg& event, std::uint32_t from) {
  switch (event.event) {
    case UFFD_EVENT_REMOVE:
      on_removed(from, OwnerAddress{event.arg.remove.start}, OwnerAddress{event.arg.remove.end});
      break;
    case UFFD_EVENT_UNMAP:
    case UFFD_EVENT_REMAP: {
      const bool moved = event.event == UFFD_EVENT_REMAP;
      const OwnerAddress start{moved ? event.arg.remap.from : event.arg.remove.start};
      const OwnerAddress end = moved ? start.plus(event.arg.remap.len) : OwnerAddress{event.arg.remove.end};
      for (std::uint32_t region = 0; region < maps_.size(); ++region) {
        if (!maps_[region]->region().owner()) continue;
        for (const Extent& extent : maps_[region]->region().extents()) {
          if (extent.start >= end || start >= extent.start.plus(extent.bytes)) continue;
          break_off("REGION_GONE", std::string("the owner has ") + (moved ? "moved" : "unmapped") +
                                       " a part of region " + std::to_string(region) +
                                       " while its pages are on their way");
        }
      }
      break;
    }
    case UFFD_EVENT_FORK:
      add_child(from, UniqueFd(static_cast<int>(event.arg.fork.ufd)));
      break;
    default:
      break;
  }
}

void Pager::on_removed(std::uint32_t from, OwnerAddress start, OwnerAddress end) {
  const pid_t owner = maps_[from]->region().owner()->pid();
  for (std::uint32_t region = 0; region < maps_.size(); ++region) {
    const Region& memory = maps_[region]->region();
    if (!attached_[region].removed || memory.owner()->pid() != owner) continue;
    memory.for_each_run_between(start, end, [&](PageRun run) {
      // What is here is dropped by the discard itself, and found missing after it.
      const AtomicBitmap& here =
          huge_[region] && serving() ? huge_[region]->landed() : maps_[region]->present;
      for (PageNumber at = run.first;;) {
        const auto absent = here.next_clear(at, run.end(), run.count);
        if (!absent) break;
        attached_[region].removed->set_run(*absent);
        at = absent->end();
      }
    });
  }
}

// Nothing, where nobody tells what is discarded.
std::shared_lock<std::shared_mutex> Pager::share_layout(std::uint32_t region) {
  if (!attached_[region].removed) return {};
  // A lock that is shared again and again may keep out for ever whoever wants it whole.
  for (int looks = 0; reader_waits_.load() && looks < kLetGoFirst; ++looks) ::sched_yield();
  return std::shared_lock(layout_);
}

// Under layout_: what the owner has discarded meanwhile becomes zeros.
PageResult Pager::copy_present(std::uint32_t region, PageRun run, const std::byte* bytes) {
  const ArrivalMap& map = *maps_[region];
  const std::uint64_t page_size = map.page_size();
  const auto sharing = share_layout(region);
  const AtomicBitmap& removed = *attached_[region].removed;
  PageResult total;
  while (run.count > 0) {
    const bool zeros = removed.test(run.first);
    const PageRun alike = removed.alike(run);
    const OwnerAddress to = map.region().owner_address(alike.first);
    const std::uint64_t length = alike.count * page_size;
    const PageResult result =
        zeros ? uffd_of(region).zeropage(to, length, true) : uffd_of(region).copy(to, bytes, length, true);
    total.bytes_done += result.bytes_done;
    total.outcome = result.outcome;
    total.error = result.error;
    if (result.outcome != PageOutcome::kOk) break;
    bytes += length;
    run = {alike.end(), run.count - alike.count};
  }
  return total;
}

void Pager::break_off_gone(std::uint32_t region) {
  const auto& owner = maps_[region]->region().owner();
  if (owner && !owner->alive()) {
    break_off("OWNER_GONE", owner->gone("a page cannot be installed").what());
  } else {
    break_off("REGION_GONE", "the memory of region " + std::to_string(region) + " is not there any more");
  }
}

void Pager::add_child(std::uint32_t from, UniqueFd child) {
  const pid_t owner = maps_[from]->region().owner()->pid();
  if (!children_[from]) {
    bool shared = false;
    for (const ArrivalMap* map : maps_) {
      const Region& memory = map->region();
      shared = shared || (memory.owner() && memory.owner()->pid() == owner && !memory.remote());
    }
    children_[from] = std::make_unique<ForkedCopies>(
        [this, owner](const ForkedCopies::Visit& visit) { visit_missing(owner, visit); }, shared,
        [this, from](OwnerAddress at) {
          const auto place = place_of(from, at);
          return place ? fails_with(place->first, place->second).count * maps_[place->first]->page_size()
                       : system_page_size();
        });
  }
  children_[from]->add(std::move(child));
}

// What is in a waiting room is not at its owner's. By the bits alone: no lock.
void Pager::visit_missing(pid_t owner, const ForkedCopies::Visit& visit) const {
  for (std::uint32_t region = 0; region < maps_.size(); ++region) {
    const ArrivalMap& map = *maps_[region];
    const Region& memory = map.region();
    if (!memory.owner() || memory.owner()->pid() != owner) continue;
    const bool in_room = memory.remote() && !serving();
    for (PageNumber at{0}; huge_[region] && at.value < map.pages();) {
      const PageRun unit = huge_[region]->unit(at);
      at = unit.end();
      if (!huge_[region]->whole(unit.first))
        visit(memory.owner_address(unit.first), unit.count * map.page_size());
    }
    for (PageNumber at{0}; !huge_[region] && at.value < map.pages();) {
      const auto missing = in_room ? std::optional(PageRun{at, map.pages() - at.value})
                                   : map.present.next_clear(at, PageNumber{map.pages()}, map.pages());
      if (!missing) break;
      at = missing->end();
      map.for_each_run(*missing, [&](PageRun part) {
        visit(memory.owner_address(part.first), part.count * map.page_size());
      });
    }
  }
}

Pager::Mapped Pager::mapped_alike(std::uint32_t region, PageRun run) const {
  const Region& memory = maps_[region]->region();
  const std::uint64_t page_size = maps_[region]->page_size();
  const OwnerAddress start = memory.owner_address(run.first);
  Mapped mapped{false, run.count};
  for_each_mapped_area(
      [&](const MappedArea& area) {
        if (area.end <= start) return true;
        mapped.there = area.start <= start;
        const std::uint64_t border = mapped.there ? area.end.value : area.start.value;
        mapped.count = std::min(run.count, (border - start.value) / page_size);
        return false;
      },
      memory.owner().get());
  return mapped;
}

}  // namespace memferry
