// A source that is connected and says nothing. Its process may be stopped, or its host hang behind a kernel that still
// answers; no connection ends then, and where nobody waits for a page nobody would ask it for one.
#include <algorithm>

#include "transfer/receiver_impl.h"
#include "wire/socket.h"

namespace memferry {
namespace {

constexpr int kLooks = 8;  // within each of the two times

}  // namespace

// While pages are missing and the source can be asked, be it by its demand channel alone. Gives when to look again. Without servers every missing page is
// the source's to bring; with them those that nobody else is known to have.
//
// An answer to somebody who waits has its time whatever else comes: the demand channel's answers wait for nothing. Nobody
// waits for a probe. It is sent when nothing comes at all, and only silence makes a cut of it: behind a link of a few KB/s
// its answer may take long, and a source that is held to a few KB/s sends a piece now and then.
Receiver::Impl::Clock::time_point Receiver::Impl::look_after_source_locked(Clock::time_point now) {
  if (pager->longest_wait() > config.answer_timeout) {
    cut_locked({ChannelEnd::Kind::kCut, "CHANNEL_LOST", "no answer to a fault in time"});
    return now;
  }
  const Clock::time_point again = now + std::min(config.answer_timeout, config.silence_timeout) / kLooks;
  if (!all_attached_locked()) return again;
  const Clock::duration silence = silence_locked();
  if (std::min<Clock::duration>(pager->longest_probe(), silence) > config.answer_timeout) {
    cut_locked({ChannelEnd::Kind::kCut, "CHANNEL_LOST", "the source says nothing, though pages are missing"});
    return now;
  }
  if (silence >= config.silence_timeout) {
    if (const auto page = wanted_of_source_locked()) pager->probe(page->region, page->run.first);
  }
  return again;
}

// As the kernel has it: a piece of a page counts too, and what lies here unread is no silence of the source's. A
// connection that has ended is its reader's to tell.
Receiver::Impl::Clock::duration Receiver::Impl::silence_locked() const {
  Clock::duration shortest = Clock::duration::max();
  for (const auto& channel : channels) {
    const auto& stream = channel->next ? channel->next : channel->current;
    const auto silent = stream ? wire::silent_for(stream->fd()) : std::nullopt;
    shortest = std::min(shortest, silent ? Clock::duration(*silent) : Clock::duration::zero());
  }
  return shortest;
}

std::optional<RegionRun> Receiver::Impl::wanted_of_source_locked() const {
  if (gather) return uncovered;
  const std::vector<RegionRun> missing = missing_runs(1);
  return missing.empty() ? std::nullopt : std::optional(missing.front());
}

}  // namespace memferry
