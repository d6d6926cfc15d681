// A way that sends references: pages that its server holds already go as their hashes.
#include "transfer/scatter_dedup.h"

namespace memferry {

bool Scatter::may_refer(const Way& way) const {
  return dedup_ && begun_ && way.server != Way::kNobody && !way.stalled && !way.lane.owes() &&
         way.lane.has_room_for_small_batch() && dedup_->any_references_locked(way.server);
}

bool Scatter::send_references(Way& way, std::string& cut) {
  wire::Holders holders;
  bool other_holders = false;
  {
    const std::lock_guard lock(mutex_);
    if (!may_refer(way)) return true;
    holders = dedup_->next_holders_locked(way.server);
    other_holders = way.lane.needs_barrier(holders, true);
  }
  if (other_holders && !send_barrier(way, true, cut)) return false;

  std::vector<Dedup::Reference> taken;
  std::vector<RegionRun> runs;
  std::uint64_t bytes = 0;
  {
    const std::lock_guard lock(mutex_);
    // They may have been given back meanwhile, and others have come.
    if (!may_refer(way) || way.lane.needs_barrier(holders, true)) return true;
    std::size_t seen = 0;
    dedup_->look_locked(way.server, holders, taken, seen);
    for (const Dedup::Reference& each : taken) {
      const Dedup::Page& page = each.page;
      (*sinks_)[page.region](page.page, page.xxh3, false);
      const bool joins =
          !runs.empty() && runs.back().region == page.region && runs.back().run.end() == page.page;
      if (joins) {
        ++runs.back().run.count;
      } else {
        runs.push_back({page.region, {page.page, 1}});
      }
    }
    bytes = runs.size() * sizeof(wire::FrameHeader) + taken.size() * sizeof(wire::ContentHash);
    // Into the lane before it leaves the list: at no time is it in neither.
    if (!taken.empty()) {
      way.lane.sent(runs, bytes, holders, true);
      way.replicas.set(holders.second);
      servers_[static_cast<std::size_t>(way.server)]->bytes += bytes;
    }
    dedup_->drop_locked(way.server, seen);
  }
  if (taken.empty()) {
    check_drained();
    return true;
  }
  // What the destination or a server has of them is no base for what is sent next.
  if (DeltaCache* const cache = config_.encoding.cache; cache != nullptr && cache->open()) {
    for (const RegionRun& each : runs) cache->forget(each.region, each.run);
  }

  std::vector<std::byte> buffer;
  buffer.reserve(static_cast<std::size_t>(bytes));
  std::vector<wire::ContentHash> hashes;
  std::size_t at = 0;
  for (const RegionRun& each : runs) {
    hashes.clear();
    for (std::uint64_t i = 0; i < each.run.count; ++i) hashes.push_back(taken[at++].page.hash);
    wire::FrameHeader header =
        wire::make_header(wire::FrameType::kReference, each.region, each.run, holders.tag());
    const auto payload = std::as_bytes(std::span(hashes));
    wire::seal(header, payload);
    const auto* head = reinterpret_cast<const std::byte*>(&header);
    buffer.insert(buffer.end(), head, head + sizeof header);
    buffer.insert(buffer.end(), payload.begin(), payload.end());
  }
  if (!send_chains_over(way, cut)) return false;
  dedup_->count_overhead(buffer.size());
  way.sending_since.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
  const wire::IoResult result = way.stream->send_all(std::span<const std::byte>(buffer));
  way.sending_since.store(0, std::memory_order_relaxed);
  link_pacer_.debit(buffer.size());
  shared_.pacer.debit_limit(buffer.size());
  // Its barrier comes after this: before a page of the next round is looked for, it is known to have been sent.
  shared_.count_sent({.result = result, .bytes = buffer.size(), .runs = runs});
  if (!result.done()) cut = way.name + ": " + result.describe();
  return result.done();
}

}  // namespace memferry
