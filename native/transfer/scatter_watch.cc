// The watcher of a scatter: who does not answer in time, and what memory others hold and is not needed here.
#include <algorithm>
#include <optional>
#include <utility>

#include "fault/discard.h"
#include "transfer/scatter_dedup.h"

namespace memferry {
namespace {

constexpr std::chrono::milliseconds kWatchInterval{20};
// What is to go by a way as a reference waits no longer for it: somebody else sends it.
constexpr std::chrono::milliseconds kReferencePatience{1000};
constexpr std::chrono::milliseconds kLastReferencePatience{160};
// A longer pause of the watcher's own says nothing about its peers: it counts as one interval. What came before it
// does count: a process that is stopped again and again, or starved, must not wait for ever for one that is silent.
constexpr std::chrono::milliseconds kWatchGap{500};

}  // namespace

// Since when a way has given no sign: a batch is not acknowledged, or its thread is stuck in the socket, and the other
// side has not said since that it is at it.
std::optional<Scatter::Clock::time_point> Scatter::waits_since(const Way& way) const {
  std::optional<Clock::time_point> since = way.lane.waiting_since();
  if (const Clock::rep sending = way.sending_since.load(std::memory_order_relaxed); sending != 0) {
    const Clock::time_point stuck{Clock::duration(sending)};
    if (!since || stuck < *since) since = stuck;
  }
  return since ? std::optional(way.lane.silent_since(*since)) : std::nullopt;
}

// Nothing is left to take and this way still has some, however steadily it acknowledges: a slow one does that too.
bool Scatter::tail_is_late(const Way& way, Clock::time_point now) const {
  if (!dry_ || now - dry_since_ <= kTailPatience) return false;
  const auto oldest = way.lane.oldest_sent();
  const Clock::rep sending = way.sending_since.load(std::memory_order_relaxed);
  return (oldest && now - *oldest > kTailPatience) ||
         (sending != 0 && now - Clock::time_point(Clock::duration(sending)) > kTailPatience);
}

// Who does not acknowledge, and what to do about it.
void Scatter::watch(WorkerThread& self) {
  try {
    watch_until_stopped(self);
  } catch (const std::exception& error) {
    shared_.broken("SYSTEM", error.what());
  }
}

void Scatter::watch_until_stopped(WorkerThread& self) {
  Clock::time_point looked_at = Clock::now();
  while (!self.stopping()) {
    self.wait(static_cast<int>(kWatchInterval.count()));
    bool due = false;
    bool hopeless = false;
    std::string unknown;  // where the pages are, and why
    {
      const std::lock_guard lock(mutex_);
      if (closing_) return;
      due = std::exchange(drained_due_, false);
      const Clock::time_point now = Clock::now();
      std::vector<Way*> ways;
      for (const auto& way : direct_) ways.push_back(way.get());
      for (const auto& server : servers_) {
        if (server->way) ways.push_back(server->way.get());
      }
      const bool somebody_idle = std::any_of(ways.begin(), ways.end(), [this](const Way* way) {
        return way->idle() && way->open && !way->stalled && !full(*way) && holders_for(*way);
      });
      if (demand_) ways.push_back(demand_.get());
      // With no destination only servers can take what is left.
      // Of servers alone no way takes anything then, and none finds out that nothing is left.
      const bool in_pairs = !one_copy_does_ && !second_copies_locked();
      hopeless = begun_ && !config_.direct && !dry_ &&
                 std::all_of(servers_.begin(), servers_.end(), [in_pairs](const auto& server) {
                   return !server->failed.empty() ||
                          (server->way && (server->full || in_pairs) && server->way->idle());
                 });
      if (hopeless && in_pairs && shared_.queue.pending_pages() == 0) {
        hopeless = false;
        looked_locked(false, false, returns_);
      }
      if (begun_ && !config_.direct && !index_lives_locked()) {
        unknown = "every server that knows where the pages are has failed";
        for (unsigned i = 0; i < where_.index_servers(); ++i) unknown += "; " + servers_[i]->failed;
      }
      const bool awake = now - looked_at < kWatchGap;
      const Clock::duration ran = awake ? now - looked_at : kWatchInterval;
      looked_at = now;
      // Of all of them before anything is put back: then the queue is not dry any more.
      std::vector<const Way*> late;
      for (const Way* way : ways) {
        if (awake && somebody_idle && tail_is_late(*way, now)) late.push_back(way);
      }
      if (dedup_ && begun_) {
        dedup_->give_back_late_locked(now, dry_ ? kLastReferencePatience : kReferencePatience);
        // Its own thread may be waiting for a directory.
        dedup_->give_up_waiting_locked(now);
      }
      for (Way* way : ways) {
        const auto since = waits_since(*way);
        if (since != std::exchange(way->silent_since, since)) way->silent_for = {};
        if (!since) continue;
        way->silent_for += std::min(ran, now - *since);
        const Clock::duration age = way->silent_for;
        if (age > config_.stall_timeout && way->server != Way::kNobody) {
          Server& server = *servers_[static_cast<std::size_t>(way->server)];
          fail_server_locked(server, way->name + " does not acknowledge what it is sent");
          continue;
        }
        if (age > config_.answer_timeout && way->stream) way->stream->shutdown();
        // In a round only servers are given up: to the destination an older copy must never come after a newer one.
        if (kind_ != Kind::kPush || !begun_) continue;
        if (age > config_.stall_timeout || std::find(late.begin(), late.end(), way) != late.end()) {
          way->stalled = way->stalled || age > config_.stall_timeout;
          // What is in the socket cannot be taken back while its thread is in it: end that.
          if (way->stalled && way->sending_since.load(std::memory_order_relaxed) != 0 && way->stream) {
            way->stream->shutdown();
          }
          if (way->lane.anything_to_take_back()) put_back_locked(way->lane.take_back(false));
        }
      }
      look_at_copies_locked();
    }
    if (due) shared_.drained();
    if (hopeless || !unknown.empty()) {
      if (unknown.empty()) {
        shared_.broken("VMD_CAPACITY", "no server takes the pages that are left");
      } else {
        shared_.broken("VMD_LOST", unknown);
      }
      return;
    }
    check_drained();
    if (config_.release_as_evicted) release_settled();
  }
}

// Gives back what others hold now. A page that may still be read here (it went out twice) waits for the end.
void Scatter::release_settled() {
  const std::unique_lock reading(release_mutex_, std::try_to_lock);
  const TouchGate::Pass pass(shared_.gate);
  if (!reading || !pass) return;
  std::vector<RegionRun> once;
  {
    // Decided together with the mark: whoever makes a page pending again sees it, or is seen here.
    const std::lock_guard lock(mutex_);
    if (held_) return;
    for (const RegionRun& each : std::exchange(to_release_, {})) {
      for (PageNumber page = each.run.first; page < each.run.end(); ++page.value) {
        if (!where_.safe(each.region, page) || sent_twice_[each.region]->test(page) ||
            shared_.queue.pending(each.region).test(page)) {
          continue;
        }
        released_[each.region]->set(page);
        if (!once.empty() && once.back().region == each.region && once.back().run.end() == page) {
          ++once.back().run.count;
        } else {
          once.push_back({each.region, {page, 1}});
        }
      }
    }
  }
  try {
    for (const RegionRun& each : once) {
      const auto& region = shared_.queue.region(each.region);
      std::unique_ptr<Discarder>& own = discarders_[each.region];
      if (region->remote()) continue;  // nobody can drop another process's private memory
      // Once a region: finding out how it is mapped reads the maps of the whole process.
      if (!own) own = std::make_unique<Discarder>(backing_of(*region));
      Discarder& discarder = *own;
      // Zeros would be written, and nothing given back: of huge pages only whole ones can be.
      if (discarder.backing().huge_bytes != 0) continue;
      for (PageRun part = each.run; part.count > 0;) {
        const auto bytes = region->contiguous(part);
        discarder.add(Address::of(bytes.data()), bytes.size());
        part = {PageNumber{part.first.value + bytes.size() / page_size_},
                part.count - bytes.size() / page_size_};
      }
      discarder.flush();
    }
  } catch (const std::exception&) {
    // Memory that cannot be given back early (it is locked, say) goes when its owner lets it go.
  }
}

}  // namespace memferry
