// After the commit: every page came and is compared with what left the source, or pages are lost.
#include <utility>

#include "control/arrival.h"

namespace memferry::control {

namespace {

constexpr std::size_t kMaxLostRuns = 4096;  // named in one report of a loss; the rest is counted only

Json run_names(const std::vector<RegionRun>& runs) {
  Json names = Json::array();
  for (const RegionRun& run : runs) {
    if (names.size() == kMaxLostRuns) break;
    names.push_back({{"region", run.region}, {"first", run.run.first.value}, {"count", run.run.count}});
  }
  return names;
}

}  // namespace

void Arrival::every_page() {
  every_page_ = true;
  if (!has_resumed() || told_complete_) return;
  told_complete_ = true;
  gather_ms_ = ms_since(resumed_at_);
  tell_complete();
}

void Arrival::tell_complete() {
  tell({{"type", "complete"}});
  if (!config_.offer.verify) finish();
  if (!link_) {
    linger();
    // The source cannot be asked for its digests: the servers have them, where it got so far.
    if (!settled_ && !evicted_ && images_) images_->ask_digests();
  }
  if (evicted_) summarise();
}

// After a loss. The servers' memory is wanted by others, and nothing is left to be said once the source is gone.
void Arrival::nothing_more_comes() {
  at_rest_ = true;
  if (images_) images_->dissolve();
  if (!link_ && has_resumed()) linger();
}

void Arrival::summarise() {
  const std::vector<std::uint32_t> regions = mismatched(digests_);
  const ReceiverStats stats = receiver_->stats();
  tell({{"type", "summary"},
        {"remoteFaults",
         {{"count", stats.faults.count},
          {"p50Us", stats.faults.p50_us},
          {"p99Us", stats.faults.p99_us},
          {"maxUs", stats.faults.max_us}}},
        {"extraMemoryBytes", stats.extra_memory_bytes},
        {"mismatched", regions}});
  conclude(regions);
}

// The regions whose content is not what left the source.
std::vector<std::uint32_t> Arrival::mismatched(const std::optional<std::vector<std::string>>& digests) {
  std::vector<std::uint32_t> regions;
  if (!digests || !config_.offer.verify) return regions;
  const std::size_t count = guest_->regions().size();
  for (std::uint32_t i = 0; i < digests->size() && i < count; ++i) {
    if (to_hex(receiver_->digest(i)) != (*digests)[i]) regions.push_back(i);
  }
  verified_ = digests->size() == count && regions.empty();
  return regions;
}

void Arrival::conclude(const std::vector<std::uint32_t>& regions) {
  if (regions.empty()) return finish();
  std::string names;
  for (const std::uint32_t index : regions) names += " '" + config_.offer.guest.regions[index].name + "'";
  reject({"VERIFICATION_FAILED", "the digests differ of" + names});
}

void Arrival::finish() {
  if (settled_) return;
  settled_ = true;
  // Nobody needs the image any more.
  if (images_) images_->dissolve();
  ArrivalReport report;
  report.migration = config_.offer.id;
  report.guest = config_.offer.guest.name;
  for (const auto& region : guest_->regions()) report.heap_bytes += region->bytes();
  report.verified = verified_;
  report.prepare_ms = prepare_ms_;
  report.gather_ms = gather_ms_;
  report.stats = receiver_->stats();
  guest_->complete(report);
}

void Arrival::lost(const EngineEvent& event) {
  std::uint64_t pages = 0;
  for (const RegionRun& run : event.lost) pages += run.run.count;
  const Cause cause{"PAGES_LOST", event.message + "; " + std::to_string(pages) + " pages of '" +
                                      config_.offer.guest.name + "' are lost, and reading one fails"};
  // Before the commit the guest is still the source's; closing the engine poisons what is missing.
  if (!has_resumed()) return fail(cause);
  reject(cause);
  lost_ = run_names(event.lost);
  tell({{"type", "lost"}, {"runs", lost_}});
  guest_->lost(event.lost, event.message);
  receiver_->acknowledge_loss();
  // Where there are servers the rest still comes, and its end is told.
  if (!images_) nothing_more_comes();
}

void Arrival::reject(const Cause& cause) {
  if (settled_) return;
  settled_ = true;
  guest_->failed(cause);
}

}  // namespace memferry::control
