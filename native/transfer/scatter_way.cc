// What goes out on a way, the destination's or a server's, and which pages: one thread a way.
#include <algorithm>
#include <atomic>

#include "transfer/scatter_impl.h"

namespace memferry {
namespace {

// In a socket for so long: the connection takes what it can.
constexpr std::chrono::microseconds kBlocked{300};
// Until the direct ways are looked at again: soon after there was something to take, since a way that is full most of
// the time is between two chunks now, and then less and less often.
constexpr std::chrono::microseconds kFirstLook{100};
constexpr std::chrono::microseconds kLastLook{800};
constexpr std::uint64_t kRecordPages = 8192;  // hashes of 64 KiB a frame

}  // namespace

bool Scatter::direct_is_full() const {
  const auto now = Clock::now().time_since_epoch();
  return std::all_of(direct_.begin(), direct_.end(), [&](const auto& way) {
    const Clock::rep since = way->sending_since.load(std::memory_order_relaxed);
    return way->pacing.load(std::memory_order_relaxed) || !takes_more(*way) ||
           (since != 0 && now - Clock::duration(since) > kBlocked);
  });
}

std::optional<wire::Holders> Scatter::holders_for(const Way& way) const {
  if (way.server == Way::kNobody) return wire::Holders{wire::Holders::kDestination, wire::Holders::kNobody};
  wire::Holders holders{static_cast<std::uint8_t>(way.server), wire::Holders::kNobody};
  if (config_.replicas < 2) return holders;
  bool away = false;
  for (std::size_t step = 1; step < servers_.size(); ++step) {
    const auto& next = servers_[(static_cast<std::size_t>(way.server) + step) % servers_.size()];
    if (!next->failed.empty() || next->full) continue;
    if (next->way) {
      holders.second = next->ordinal;
      return holders;
    }
    away = true;
  }
  return away || !one_copy_does_ ? std::nullopt : std::optional(holders);
}

bool Scatter::full(const Way& way) const {
  return way.server != Way::kNobody && servers_[static_cast<std::size_t>(way.server)]->full;
}

bool Scatter::takes_more(const Way& way) const {
  // Servers keep so many barriers; the destination answers each at once.
  const bool room = way.server == Way::kNobody ? way.lane.has_room() : way.lane.has_room_for_small_batch();
  return !way.stalled && !full(way) && !way.lane.owes() && room;
}

bool Scatter::may_take(const Way& way) const {
  return !dry_ && !way.demand && takes_more(way) && holders_for(way);
}

bool Scatter::wants_work(const Way& way) const {
  if (way.server == Way::kNobody) return may_take(way);
  return may_take(way) && direct_is_full();
}

bool Scatter::run_direct(Way& way, const std::function<bool()>& over, std::string& cut) {
  return run(way, over, cut);
}

bool Scatter::run(Way& way, const std::function<bool()>& over, std::string& cut) {
  CpuCourtesy courtesy(wire::shared_key(shared_.migration));
  const bool server = way.server != Way::kNobody;
  const wire::Pacer& pacer = server ? link_pacer_ : shared_.pacer;
  const auto ended = [&] { return over() || shared_.gate.closed(); };
  std::vector<std::byte> buffer;
  PageFrames& frames = way.chunks->frames();
  auto look = kFirstLook;
  for (;;) {
    bool records = false;
    bool chunk = false;
    bool references = false;
    bool guest_left = false;
    {
      std::unique_lock lock(mutex_);
      for (;;) {
        if (closing_ || !way.open || ended()) return false;
        const bool untold =
            way.listener != Way::kNobody && where_.anything_untold(static_cast<unsigned>(way.listener));
        // When all is evicted the destination is still told what it has not heard, as long as this connection stays.
        const bool telling = untold && kind_ == Kind::kPush;
        if (!begun_ && !server && !telling) return true;
        // Else every page that somebody else acknowledges would be a barrier here. The next answer wakes this thread.
        records = untold && way.lane.has_room_for_record();
        chunk = begun_ && wants_work(way);
        references = may_refer(way);
        if (records || chunk || references || way.lane.anything_open()) break;
        // Held up by what the receiver has in hand, or without anything to do.
        const bool held_up = begun_ && !dry_ && !takes_more(way);
        const auto asked = Clock::now();
        if (!held_up) frames.rest();
        if (server && begun_ && may_take(way)) {
          changed_.wait_for(lock, look);
          look = std::min(2 * look, kLastLook);
        } else {
          changed_.wait(lock);
          if (held_up) frames.waited(Clock::now() - asked);
        }
      }
      guest_left = kind_ == Kind::kPush;
    }
    // A barrier of their own: each may be refused, and a batch takes only so many refusals.
    if (references && (!send_references(way, cut) || !send_barrier(way, true, cut))) return false;
    if (records) {
      if (!send_records(way, buffer, cut)) return false;
    } else if (chunk) {
      look = kFirstLook;
      const auto asked = Clock::now();
      if (!shared_.pacer.wait_limit(ended)) return false;
      way.pacing.store(true, std::memory_order_relaxed);
      const bool turn = server || shared_.pacer.wait_turn();
      // Waiting for the link itself is not being full: whoever else took the chunk would wait for it as well.
      way.pacing.store(false, std::memory_order_relaxed);
      const bool link_turn = turn && link_pacer_.wait_turn();
      if (!turn || (!link_turn && ended())) return false;
      frames.waited(Clock::now() - asked);
      courtesy.follow(guest_left && pacer.should_stand_back());
      if (!send_chunk(way, *way.chunks, cut)) return false;
    }
    if (!send_barrier(way, !records && !chunk && !references, cut)) return false;
  }
}

bool Scatter::send_records(Way& way, std::vector<std::byte>& buffer, std::string& cut) {
  buffer.clear();
  Whereabouts::Record record;
  const auto listener = static_cast<unsigned>(way.listener);
  bool final = false;
  const auto take = [&] {
    // From taking a record off the list until it lies in the lane.
    const std::lock_guard lock(mutex_);
    way.in_hand = true;
    // Before it is taken: one that is told as not final and is would be passed over.
    final = kind_ == Kind::kPush;
    return where_.next_untold(listener, kRecordPages, record);
  };
  while (buffer.size() < wire::kRunBytes && take()) {
    wire::FrameHeader header =
        wire::make_header(wire::FrameType::kMap, record.region, record.run, record.holders.tag());
    if (record.zero) header.flags |= wire::kFlagZero;
    if (final) header.flags |= wire::kFlagFinal;
    // By value: a page that is being sent again may have its (equal) hash written right now.
    std::vector<std::uint64_t> hashes(record.hashes.size());
    for (std::size_t i = 0; i < hashes.size(); ++i) {
      hashes[i] =
          std::atomic_ref(const_cast<std::uint64_t&>(record.hashes[i])).load(std::memory_order_relaxed);
    }
    const auto payload = std::as_bytes(std::span(hashes));
    wire::seal(header, payload);
    const auto* head = reinterpret_cast<const std::byte*>(&header);
    buffer.insert(buffer.end(), head, head + sizeof header);
    buffer.insert(buffer.end(), payload.begin(), payload.end());
  }
  {
    // Before it leaves: as long as it is not acknowledged, not everything is told.
    const std::lock_guard lock(mutex_);
    way.in_hand = false;
    if (!buffer.empty()) way.lane.sent({}, buffer.size(), {});
    if (way.server != Way::kNobody) servers_[static_cast<std::size_t>(way.server)]->bytes += buffer.size();
  }
  if (buffer.empty()) return true;
  if (!send_chains_over(way, cut)) return false;
  shared_.count_bytes(buffer.size());
  way.sending_since.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
  const wire::IoResult result = way.stream->send_all(std::span<const std::byte>(buffer));
  way.sending_since.store(0, std::memory_order_relaxed);
  if (!result.done()) cut = way.name + ": " + result.describe();
  return result.done();
}

bool Scatter::send_chunk(Way& way, ChunkGatherer& chunks, std::string& cut) {
  wire::Holders holders;
  std::uint64_t returns = 0;
  std::shared_ptr<const std::vector<PageFrames::OnHash>> sinks;
  bool other_holders = false;
  {
    const std::lock_guard lock(mutex_);
    // While it waited for its turn the round may have ended, or what it had been taken back: what is pending now is for
    // the next one, when everybody knows that it is.
    if (!begun_ || !may_take(way)) return true;
    holders = *holders_for(way);
    returns = returns_;
    sinks = sinks_;
    other_holders = way.lane.needs_barrier(holders);
    way.in_hand = true;
  }
  if (other_holders && !send_barrier(way, true, cut)) return false;
  const bool server = way.server != Way::kNobody;
  // Inside the gate from taking on: what is taken is sent, or the region is gone.
  const TouchGate::Pass pass(shared_.gate);
  if (!pass) return false;
  chunks.frames().set_holders(holders);
  // A limit is for all ways together, and the pacer of those to servers knows none.
  const bool more = chunks.gather(*sinks, shared_.pacer.limited_chunk_bytes(wire::max_payload(page_size_)));
  if (chunks.frames().empty()) {
    {
      const std::lock_guard lock(mutex_);
      looked_locked(more, chunks.gave_back(), returns);
      way.in_hand = false;
      changed_.notify_all();
    }
    check_drained();
    return true;
  }
  {
    // Before it leaves: a refusal may be faster than this thread.
    const std::lock_guard lock(mutex_);
    way.lane.sent(chunks.frames().runs(), chunks.frames().bytes(), holders, false,
                  chunks.frames().content_pages() * page_size_);
    way.replicas.set(holders.second);
    way.in_hand = false;
    looked_locked(more, chunks.gave_back(), returns);
    if (server) servers_[static_cast<std::size_t>(way.server)]->bytes += chunks.frames().bytes();
    if (!more) changed_.notify_all();
  }
  if (!send_chains_over(way, cut)) return false;
  way.sending_since.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
  const PageFrames::Sent sent = chunks.frames().send(*way.stream);
  way.sending_since.store(0, std::memory_order_relaxed);
  link_pacer_.debit(sent.bytes);
  if (server) {
    shared_.pacer.debit_limit(sent.bytes);
  } else {
    shared_.pacer.debit(sent.bytes);
  }
  shared_.count_sent(sent);
  if (!sent.result.done()) cut = way.name + ": " + sent.result.describe();
  return sent.result.done();
}

// What a look at the queue has shown; others may have looked while this one had pages in its hands that it put back.
void Scatter::looked_locked(bool more, bool gave_back, std::uint64_t returns_before) {
  if (gave_back) {
    ++returns_;
    dry_ = false;
    changed_.notify_all();
  } else if (!more && returns_before == returns_) {
    if (!dry_) dry_since_ = Clock::now();
    dry_ = true;
  }
}

// Before whatever was taken to be sent: among that may be what had to go again.
bool Scatter::send_chains_over(Way& way, std::string& cut) {
  std::vector<wire::FrameHeader> frames;
  if (way.server != Way::kNobody) {
    const std::lock_guard lock(mutex_);
    for (const auto& [ordinal, epoch] : chains_over_) {
      const auto [told, first] = way.told_over.try_emplace(ordinal, epoch);
      if (!first && told->second == epoch) continue;
      told->second = epoch;
      frames.push_back(wire::make_header(wire::FrameType::kChainOver, ordinal, {}, epoch));
    }
  }
  if (frames.empty()) return true;
  for (wire::FrameHeader& each : frames) wire::seal(each);
  const auto bytes = std::as_bytes(std::span(frames));
  shared_.count_bytes(bytes.size());
  const wire::IoResult result = way.stream->send_all(bytes);
  if (!result.done()) cut = way.name + ": " + result.describe();
  return result.done();
}

// Behind what is enough for one, or behind everything when there is nothing more to send right now.
bool Scatter::send_barrier(Way& way, bool now, std::string& cut) {
  std::uint64_t tag = 0;
  {
    // Before it is sent: its answer may be faster than this thread.
    const std::lock_guard lock(mutex_);
    if (!way.lane.anything_open() || (!now && !way.lane.batch_is_full())) return true;
    tag = way.lane.close(Clock::now());
  }
  wire::FrameHeader header = wire::make_header(wire::FrameType::kBarrier, 0, {}, tag);
  wire::seal(header);
  shared_.count_bytes(sizeof header);
  const wire::IoResult result = way.stream->send_all(std::as_bytes(std::span(&header, 1)));
  if (!result.done()) cut = way.name + ": " + result.describe();
  return result.done();
}

}  // namespace memferry
