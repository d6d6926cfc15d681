// What a link of the gather asks its server for ahead of the guest: how much, from where on, and when it stands back.
#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>

#include "transfer/gather_link.h"

namespace memferry {

void GatherLink::choose_ahead() {
  for (;;) {
    const std::uint64_t page_size = gather_.config_.page_size;
    const bool lately = gather_.receiver_.strayed_lately();
    std::uint64_t outstanding = 0;
    std::size_t checks = 0;
    {
      const std::lock_guard lock(mutex_);
      for (const Read& read : reads_) {
        outstanding += (read.run.count - read.covered) * (read.check ? sizeof(wire::TreeHash) : page_size);
        checks += read.check ? 1 : 0;
      }
    }
    // While the map is under way nothing else is asked: its answer would only lengthen the wait.
    if (map_under_way_ || outstanding >= (asking_.empty() ? kWindowBytes / 2 : kWindowBytes)) return;
    const bool shared = gather_.receiver_.source_sends();
    const bool sparing = lately || shared;
    const bool starved = lately && !shared && run_delay_.share(Clock::now()) > kStarved;
    const unsigned reads = starved ? kStarvedReads : 1;
    if (sparing && gather_.reading_ahead_.load(std::memory_order_relaxed) >= reads) return;
    if (sparing &&
        Clock::now().time_since_epoch().count() < gather_.yield_until_.load(std::memory_order_relaxed)) {
      return;
    }
    // They take next to nothing of the link.
    if (gather_.base_ && checks < GatherBase::kChecksAtOnce) {
      if (auto check = gather_.base_->next(server_.ordinal)) {
        const std::lock_guard lock(mutex_);
        note_check(std::move(check));
        continue;
      }
    }
    // Not slept through: the map and whoever waits for what it says must not wait for a limit on reading ahead.
    if (const auto delay = gather_.limit_.delay(); delay > wire::Duration::zero()) {
      limited_until_ = Clock::now() + delay;
      return;
    }
    const std::uint64_t bytes = starved ? kStarvedRead : lately ? kSmallRead : wire::kRunBytes;
    std::uint32_t region = 0;
    PageRun run{};
    if (!next_run(std::max<std::uint64_t>(1, bytes / page_size), region, run)) return;
    gather_.limit_.debit(run.count * page_size);
    const std::lock_guard lock(mutex_);
    asking_.push_back(note_read(region, run));
  }
}

// From where the last fault was, or else from where this link was, on and around.
bool GatherLink::next_run(std::uint64_t max_pages, std::uint32_t& region, PageRun& run) {
  const auto regions = static_cast<std::uint32_t>(gather_.maps_.size());
  gather_.follow_faults(at_);
  for (std::uint32_t step = 0; step <= regions;) {
    ArrivalMap& map = *gather_.maps_[at_.region];
    const auto taken = server_.todo[at_.region]->take_run(at_.page, PageNumber{map.pages()}, max_pages);
    if (!taken) {
      at_.region = (at_.region + 1) % regions;
      at_.page = PageNumber{0};
      ++step;
      continue;
    }
    at_.page = taken->end();
    // What has come by another way since is left out at both ends.
    PageRun left = *taken;
    while (left.count > 0 && map.received.test(left.first))
      left = {PageNumber{left.first.value + 1}, left.count - 1};
    while (left.count > 0 && map.received.test(PageNumber{left.end().value - 1})) --left.count;
    if (left.count == 0) continue;
    region = at_.region;
    run = left;
    return true;
  }
  return false;
}

void GatherLink::yield_to_source(wire::Stream& stream, Clock::duration took) {
  if (!gather_.receiver_.source_sends()) return;
  tcp_info info{};
  socklen_t bytes = sizeof info;
  if (::getsockopt(stream.fd(), IPPROTO_TCP, TCP_INFO, &info, &bytes) != 0) return;
  const auto queued =
      std::chrono::microseconds(std::int64_t{info.tcpi_rtt} - std::int64_t{info.tcpi_min_rtt});
  if (queued < kQueue) return;
  // A read may also take long because nobody runs: the link was not what it waited for.
  const Clock::duration pause = std::min<Clock::duration>(kYield * took, kLongestYield);
  gather_.yield_until_.store((Clock::now() + pause).time_since_epoch().count(), std::memory_order_relaxed);
}

}  // namespace memferry
