// What a receiver does with pages that come from VMD servers, where faults go, and what is lost for good.
#include <algorithm>
#include <cstring>
#include <thread>

#include "os/sys_error.h"
#include "transfer/receiver_impl.h"

namespace memferry {
namespace {

// How often the map is asked for while pages have no known place and the source is away.
constexpr std::chrono::milliseconds kMapAgain{1000};
// Before a source that is away counts as missed: the servers may know all that is needed.
constexpr std::chrono::milliseconds kMapPatience{1500};
constexpr std::chrono::microseconds kSwitchTakes{50};

}  // namespace

void Receiver::Impl::make_gather() {
  if (config.servers.empty()) return;
  std::vector<ArrivalMap*> all;
  for (const auto& map : maps) all.push_back(map.get());
  Gather::Config ours;
  ours.servers = config.servers;
  ours.image = config.migration;
  ours.recover_timeout = config.recover_timeout;
  ours.page_size = page_size;
  ours.limit = config.gather_limit;
  ours.sourceless = config.sourceless;
  ours.compressions = config.encodings & wire::kCompressions;
  Gather::Receiver callbacks;
  callbacks.pages = [this](std::uint32_t region, PageRun run, std::span<const std::byte> bytes,
                           std::span<const std::uint64_t> hashes) { gathered(region, run, bytes, hashes); };
  ours.base = config.base_images;
  callbacks.from_base = [this](std::uint32_t region, PageRun run, std::span<const std::byte> bytes,
                               std::span<const std::uint64_t> hashes) {
    from_base(region, run, bytes, hashes);
  };
  callbacks.zeros = [this](std::uint32_t region, PageRun run) { gathered_zeros(region, run); };
  callbacks.changed = [this] {
    if (pager) pager->ask_again(false);
    changed.notify_all();
  };
  callbacks.ask_again = [this] {
    if (pager) pager->ask_again(true);
  };
  callbacks.strayed_lately = [this] { return state == State::kPaging && pager->strayed_lately(); };
  callbacks.source_sends = [this] {
    return source_sends.load(std::memory_order_relaxed) && !rounds_over &&
           Clock::now().time_since_epoch().count() >= rests_until.load(std::memory_order_relaxed);
  };
  callbacks.frozen = [this] { return state != State::kFilling; };
  gather = std::make_unique<Gather>(std::move(ours), std::move(all), std::move(callbacks));
  gather_filler = std::make_unique<Filler>(backings, ahead.get());
  if (pager) {
    pager->set_router([this](const Pager::Asked& asked) { return route(asked); });
  }
}

// The source is asked while it is there, since it has every page. Only what it has sent to a server already would take
// its link twice: that is asked for there, unless the server is far away or late.
Pager::Route Receiver::Impl::route(const Pager::Asked& asked) {
  const auto& [region, run, source_online, walk, tried, late, huge] = asked;
  const bool coming = walk && gather->coming(region, run.first);
  if (source_online && !gather->elsewhere(region, run.first)) {
    if (late) gather->late(region, run.first);
    if (tried || huge) return Pager::Route::kSource;
    if (coming) return Pager::Route::kComing;
    return gather->request_near(region, run, pager->writer()) ? Pager::Route::kTried : Pager::Route::kSource;
  }
  if (coming) return Pager::Route::kComing;
  return gather->request(region, run) ? Pager::Route::kSent : Pager::Route::kNobody;
}

// The switch takes a moment, and neither way of storing is right in the middle of it. Gives false when nothing is
// to be stored at all. `filling` is held when the answer is that memory is still being filled.
bool Receiver::Impl::storing(std::unique_lock<std::mutex>& filling) {
  for (;;) {
    if (closing) return false;
    switch (state.load()) {
      case State::kFilling:
        filling = std::unique_lock(gather->filling());
        if (state == State::kFilling) return true;
        filling.unlock();
        break;
      case State::kPaging:
        return true;
      case State::kSwitching:
        std::this_thread::sleep_for(kSwitchTakes);
        break;
      case State::kComplete:
        // For a moment only, perhaps: seal() looks whether everything is here. Then it must come again.
        if (sealing) {
          std::this_thread::sleep_for(kSwitchTakes);
          break;
        }
        return false;
      default:
        return false;
    }
  }
}

void Receiver::Impl::gathered(std::uint32_t region, PageRun run, std::span<const std::byte> bytes,
                              std::span<const std::uint64_t> hashes) {
  std::unique_lock<std::mutex> filling;
  if (!storing(filling)) return;
  if (filling.owns_lock()) {
    fill_gathered(region, run, bytes, hashes);
    if (filled_wanted) check_filled();
    return;
  }
  install_current(region, run, bytes, hashes, [this](std::uint64_t pages) {
    pages_received.fetch_add(pages, std::memory_order_relaxed);
    pages_gathered.fetch_add(pages, std::memory_order_relaxed);
  });
}

// As what is gathered, but it was here. There is no filling without a source.
void Receiver::Impl::from_base(std::uint32_t region, PageRun run, std::span<const std::byte> bytes,
                               std::span<const std::uint64_t> hashes) {
  std::unique_lock<std::mutex> filling;
  if (!storing(filling) || filling.owns_lock()) return;
  install_current(region, run, bytes, hashes, [this](std::uint64_t pages) {
    pages_from_base.fetch_add(pages, std::memory_order_relaxed);
  });
}

// While paging: those whose hash is what the map says. `count` is told how many were not here yet, before they may
// complete it.
void Receiver::Impl::install_current(std::uint32_t region, PageRun run, std::span<const std::byte> bytes,
                                     std::span<const std::uint64_t> hashes,
                                     const std::function<void(std::uint64_t)>& count) {
  // Looked at again: it was current when it came, and the switch may have had it discarded since. Nothing is
  // discarded after that.
  ArrivalMap& map = *maps[region];
  const auto current = [&](std::uint64_t at) {
    return gather->is_current(region, PageNumber{run.first.value + at}, hashes[static_cast<std::size_t>(at)]);
  };
  for (std::uint64_t i = 0; i < run.count;) {
    if (!current(i)) {
      ++i;
      continue;
    }
    std::uint64_t end = i;
    for (; end < run.count && current(end); ++end) {
      const PageNumber page{run.first.value + end};
      if (!map.received.test(page))
        map.keep_hashes({page, 1}, hashes.subspan(static_cast<std::size_t>(end), 1));
    }
    const PageRun part{PageNumber{run.first.value + i}, end - i};
    const Pager::Installed installed =
        pager->install(region, part, bytes.subspan(static_cast<std::size_t>(i * page_size)).data());
    count(installed.pages);
    account(installed.pages);
    i = end;
  }
}

// Into memory that nobody uses yet, with the lock held that keeps locations as they are.
void Receiver::Impl::fill_gathered(std::uint32_t region, PageRun run, std::span<const std::byte> bytes,
                                   std::span<const std::uint64_t> hashes) {
  ArrivalMap& map = *maps[region];
  const auto wanted = [&](std::uint64_t at) {
    const PageNumber page{run.first.value + at};
    return !map.received.test(page) && gather->is_current(region, page, hashes[static_cast<std::size_t>(at)]);
  };
  for (std::uint64_t i = 0; i < run.count;) {
    if (!wanted(i)) {
      ++i;
      continue;
    }
    std::uint64_t end = i + 1;
    while (end < run.count && wanted(end)) ++end;
    const PageRun part{PageNumber{run.first.value + i}, end - i};
    wire::FrameHeader header = wire::make_header(wire::FrameType::kPages, region, part);
    wire::seal_pages(header, page_size,
                     hashes.subspan(static_cast<std::size_t>(i), static_cast<std::size_t>(part.count)));
    std::span<const std::byte> left = bytes.subspan(static_cast<std::size_t>(i * page_size));
    bool verified = false;
    const auto read = [&left](std::span<std::byte> into) {
      std::copy_n(left.begin(), into.size(), into.begin());
      left = left.subspan(into.size());
      return wire::IoResult{};
    };
    (void)gather_filler->pages(read, header, map, verified);
    pages_received.fetch_add(part.count, std::memory_order_relaxed);
    pages_gathered.fetch_add(part.count, std::memory_order_relaxed);
    i = end;
  }
}

void Receiver::Impl::gathered_zeros(std::uint32_t region, PageRun run) {
  std::unique_lock<std::mutex> filling;
  if (!storing(filling)) return;
  ArrivalMap& map = *maps[region];
  if (filling.owns_lock()) {
    gather->forget(region, run);
    gather_filler->zeros(region, map, run);
    pages_zero.fetch_add(run.count, std::memory_order_relaxed);
    if (filled_wanted) check_filled();
    return;
  }
  for (PageNumber from = run.first;;) {
    const auto unclaimed = map.received.next_clear(from, run.end(), run.count);
    if (!unclaimed) break;
    map.keep_zero_hashes(*unclaimed);
    from = unclaimed->end();
  }
  const Pager::Installed zeros = pager->install_zeros(region, run);
  pages_zero.fetch_add(zeros.pages, std::memory_order_relaxed);
  account(zeros.pages);
}

void Receiver::Impl::check_filled() {
  if (state != State::kFilling || !filled() || !filled_wanted.exchange(false)) return;
  EngineEvent event{};
  event.kind = EngineEventKind::kFilled;
  const std::lock_guard lock(mutex);
  push(std::move(event));
}

// While the source is away: what has a place is gathered, the map is fetched for the rest, and what stays without
// a place, or has one only with servers that have failed, is lost in the end.
void Receiver::Impl::look_after_gather_locked(std::unique_lock<std::mutex>& lock) {
  const Clock::time_point now = Clock::now();
  const bool away = source_left || !all_attached_locked();
  source_sends = !away;
  if (!away) {
    source_gone_at = Clock::time_point::max();
  } else if (source_gone_at == Clock::time_point::max()) {
    source_gone_at = now;
  }
  // A source that said goodbye has told the servers everything; one that was cut may come back.
  const bool no_source = source_left || (away && now >= source_gone_at + config.recover_timeout);
  if (!no_source) {
    no_source_since = Clock::time_point::max();
  } else if (no_source_since == Clock::time_point::max()) {
    no_source_since = now;
  }
  uncovered = gather->first_uncovered();
  const bool covered = !uncovered;
  if (paused != (away && !covered && (paused || now - source_gone_at > kMapPatience))) {
    paused = !paused;
    EngineEvent event{};
    event.kind = paused ? EngineEventKind::kPaused : EngineEventKind::kRecovered;
    if (paused) event.message = "the source is away, and pages are missing that no server has";
    push(std::move(event));
  }
  // Until it was given up it may have gone on scattering, and told the servers more.
  const bool last_word = no_source && map_asked_at < no_source_since;
  if (away && !covered && (last_word || now - map_asked_at > kMapAgain)) {
    map_asked_at = now;
    lock.unlock();
    gather->fetch_map();
    lock.lock();
  }
  std::vector<std::string> names;
  const auto runs =
      gather->hopeless(no_source, no_source ? no_source_since : source_gone_at, names, kMostLostRuns);
  if (!runs.empty()) settle_lost_locked(lock, runs, names);
}

void Receiver::Impl::settle_lost_locked(std::unique_lock<std::mutex>& lock,
                                        const std::vector<RegionRun>& hopeless,
                                        const std::vector<std::string>& names) {
  std::vector<RegionRun> lost;
  std::uint64_t pages = 0;
  lock.unlock();
  for (const RegionRun& each : hopeless) {
    for (const PageRun run : pager->give_up(each.region, each.run)) {
      lost.push_back({each.region, run});
      pages += run.count;
    }
  }
  lock.lock();
  if (pages == 0 || closing) return;
  pages_lost.fetch_add(pages);
  settled.fetch_add(pages, std::memory_order_acq_rel);
  std::string who;
  for (const std::string& name : names) who += (who.empty() ? "" : ", ") + name;
  EngineEvent event{};
  event.kind = EngineEventKind::kLost;
  event.code = "PAGES_LOST";
  event.message = who.empty() ? "neither the source nor a server has them" : "they were with " + who;
  event.lost = with_huge_pages(lost);
  push(std::move(event));
  poison_at = std::min(poison_at, Clock::now() + config.loss_grace);
  lock.unlock();
  check_complete();
  lock.lock();
}

// Newer content than any server has: in a round, before the switch.
void Receiver::Impl::forget_locations(std::uint32_t region, PageRun run) {
  if (!gather) return;
  const std::lock_guard filling(gather->filling());
  gather->forget(region, run);
}

bool Receiver::Impl::on_map(Conversation& with, const wire::FrameHeader& header) {
  if (!gather) return with.bad("a map without servers");
  if (base_awaited) return with.bad("a map before the base is there");
  if (with.channel.index != 0 && !with.channel.demand) return with.bad("maps come on channel 0");
  if (header.region >= maps.size()) return with.bad("no such region");
  ArrivalMap& map = *maps[header.region];
  if (!wire::run_inside(header.first_page, header.page_count, map.pages()))
    return with.bad("pages outside the region");
  std::vector<std::byte>& staging = with.channel.staging;
  if (!with.read_checked_payload(header, staging)) return false;
  std::vector<std::uint64_t>& hashes = with.channel.hashes;
  hashes.resize(staging.size() / sizeof(std::uint64_t));
  if (!hashes.empty()) std::memcpy(hashes.data(), staging.data(), staging.size());
  const PageRun run{PageNumber{header.first_page}, header.page_count};
  const bool zero = (header.flags & wire::kFlagZero) != 0;
  const wire::Holders holders = wire::Holders::of(header.tag);
  std::unique_lock<std::mutex> filling;
  if (state == State::kFilling && !zero) {
    // What is here of them is older. Nothing is gathered between this and the new location.
    filling = std::unique_lock(gather->filling());
    if (state == State::kFilling && holders.first != wire::Holders::kDestination) {
      map.received.clear_run(run);
      map.zero.clear_run(run);
      map.suspect.clear_run(run);
    }
  }
  return gather->record(header.region, run, holders, zero, hashes, true) ||
         with.bad("a map with a holder that is not there");
}

bool Receiver::Impl::on_elsewhere(Conversation& with, const wire::FrameHeader& header) {
  if (!gather || !with.channel.demand || !pager)
    return with.bad("a page elsewhere, where there is nobody else");
  if (header.region >= maps.size() ||
      !wire::run_inside(header.first_page, header.page_count, maps[header.region]->pages()))
    return with.bad("pages outside the region");
  if (!with.check_no_payload(header)) return false;
  for (std::uint64_t i = 0; i < header.page_count; ++i) {
    const PageNumber page{header.first_page + i};
    gather->set_elsewhere(header.region, page);
    pager->ask_elsewhere(header.region, page);
  }
  return true;
}

}  // namespace memferry
