#include "transfer/scatter_dedup.h"

#include <algorithm>
#include <bit>

namespace memferry {
namespace {

constexpr std::uint64_t kMostTwins = 1ULL << 22;

}  // namespace

Scatter::Dedup::Region::Region(std::uint64_t pages)
    : names(std::make_unique_for_overwrite<wire::ContentName[]>(static_cast<std::size_t>(pages))),
      seen(std::make_unique_for_overwrite<std::uint64_t[]>(static_cast<std::size_t>(pages))),
      examined(pages),
      named(pages),
      to_tell(pages),
      told(pages),
      referred(pages) {}

Scatter::Dedup::Dedup(Scatter& scatter, const ContentKey& key)
    : scatter_(scatter),
      hasher_(key),
      references_(scatter.config_.servers.size()),
      directories_(scatter.config_.servers.size()),
      identities_(scatter.config_.servers.size(), 0),
      copy_(static_cast<std::size_t>(scatter.page_size_)) {
  std::uint64_t all = 0;
  for (std::uint32_t region = 0; region < scatter.shared_.queue.regions(); ++region) {
    const std::uint64_t pages = scatter.shared_.queue.region(region)->capacity_pages();
    regions_.push_back(std::make_unique<Region>(pages));
    all += pages;
  }
  const std::uint64_t entries = std::bit_ceil(std::min(std::max<std::uint64_t>(2 * all, 64), kMostTwins));
  twins_ = Mapping::anonymous(entries * sizeof(std::uint64_t));
  twin_mask_ = entries - 1;
}

void Scatter::Dedup::start() {
  thread_.start("mf-dedup", [this](WorkerThread& self) { run(self); });
}

void Scatter::Dedup::begin_locked(Kind kind, bool references) {
  ++round_;
  const SendQueue& queue = scatter_.shared_.queue;
  looks_ = references &&
           (kind == Kind::kPush || !scatter_.config_.direct ||
            dedup_round_is_long(queue.content_pages() * scatter_.page_size_, link_bytes_per_second_));
  pages_before_ = pages_;
  waiting_ = {};
  // Guests that leave at once begin in different places: where they are alike they are alike there too, most often, and
  // one that comes to what another has sent already asks nobody to wait.
  if (round_ == 1) {
    std::uint64_t pages = 0;
    for (std::uint32_t region = 0; region < regions_.size(); ++region) pages += queue.known_pages(region);
    if (pages > 0)
      scatter_.shared_.queue.begin_servers_at(wire::shared_key(scatter_.shared_.migration) % pages);
  }
  for (std::uint32_t region = 0; region < regions_.size(); ++region) {
    const AtomicBitmap& pending = scatter_.shared_.queue.pending(region);
    Region& of = *regions_[region];
    PageNumber at{0};
    while (const auto run = pending.next_set(at, PageNumber{pending.capacity()}, pending.capacity())) {
      for (AtomicBitmap* each : {&of.examined, &of.named, &of.to_tell, &of.told, &of.referred})
        each->clear_run(*run);
      scatter_.shared_.queue.forget_first(region, *run);
      at = run->end();
    }
  }
}

void Scatter::Dedup::shut_down_locked() {
  for (const Directory& each : directories_) {
    if (each.stream) each.stream->shutdown();
  }
}

void Scatter::Dedup::server_failed_locked(std::uint8_t server) {
  if (directories_[server].stream) directories_[server].stream->shutdown();
  std::vector<RegionRun> runs;
  runs.reserve(reference_count_);
  for (auto& references : references_) {
    std::erase_if(references, [&](const Reference& each) {
      const bool its = each.holders.has(server);
      if (its) given_back_locked(each, runs);
      return its;
    });
  }
  reference_count_ -= runs.size();
  scatter_.put_back_locked(runs);
}

void Scatter::Dedup::given_back_locked(const Reference& reference, std::vector<RegionRun>& into) {
  regions_[reference.page.region]->to_tell.set(reference.page.page);
  into.push_back({reference.page.region, {reference.page.page, 1}});
}

void Scatter::Dedup::stop() {
  thread_.stop();
  // A closed sender may be kept for its last figures; its sockets must not be.
  const std::lock_guard lock(scatter_.mutex_);
  for (Directory& each : directories_) each.stream.reset();
}

void Scatter::Dedup::look_locked(int server, wire::Holders holders, std::vector<Reference>& into,
                                 std::size_t& seen) const {
  into.clear();
  seen = 0;
  for (const Reference& each : references_[static_cast<std::size_t>(server)]) {
    if (each.holders != holders || into.size() == kMostAtOnce) return;
    ++seen;
    // A fault's answer was faster.
    if (!scatter_.where_.safe(each.page.region, each.page.page)) into.push_back(each);
  }
}

void Scatter::Dedup::drop_locked(int server, std::size_t seen) {
  auto& references = references_[static_cast<std::size_t>(server)];
  for (std::size_t i = 0; i < seen; ++i) {
    const Page& page = references.front().page;
    if (!scatter_.where_.safe(page.region, page.page)) regions_[page.region]->referred.set(page.page);
    references.pop_front();
  }
  reference_count_ -= seen;
}

void Scatter::Dedup::give_back_locked(int server) {
  auto& references = references_[static_cast<std::size_t>(server)];
  std::vector<RegionRun> runs;
  runs.reserve(references.size());
  for (const Reference& each : references) given_back_locked(each, runs);
  references.clear();
  reference_count_ -= runs.size();
  scatter_.put_back_locked(runs);
}

void Scatter::Dedup::give_back_late_locked(Clock::time_point now, Clock::duration patience) {
  for (std::size_t server = 0; server < references_.size(); ++server) {
    const auto& references = references_[server];
    if (!references.empty() && now - references.front().since > patience)
      give_back_locked(static_cast<int>(server));
  }
}

void Scatter::Dedup::settled_locked(std::uint32_t region, PageRun run, wire::Holders holders,
                                    bool references) {
  Region& of = *regions_[region];
  for (PageNumber page = run.first; page < run.end(); ++page.value) {
    const bool referred = of.referred.clear(page);
    if (references) {
      ++pages_;
      of.to_tell.clear(page);
      of.told.set(page);  // its holders have said so
      continue;
    }
    // Referred to as well, and this copy was faster: these holders do not know it by its name.
    if (referred) of.to_tell.set(page);
    if (of.to_tell.test(page)) {
      const bool joins = !settled_.empty() && settled_.back().region == region &&
                         settled_.back().run.end() == page && settled_.back().holders == holders;
      if (joins) {
        ++settled_.back().run.count;
      } else if (settled_.size() < kMostSettled) {
        settled_.push_back({region, {page, 1}, holders});
      }
    }
  }
}

void Scatter::Dedup::put_back_locked(std::uint32_t region, PageNumber page) {
  if (regions_[region]->referred.clear(page)) regions_[region]->to_tell.set(page);
}

void Scatter::Dedup::refused_locked(std::uint32_t region, PageRun run) {
  Region& of = *regions_[region];
  for (PageNumber page = run.first; page < run.end(); ++page.value) {
    if (!of.referred.clear(page)) continue;
    // What is sent plainly now replaces what was wrong of it.
    of.to_tell.set(page);
    ++refused_;
  }
}

DedupStats Scatter::Dedup::stats() const {
  const std::lock_guard lock(scatter_.mutex_);
  return {pages_, refused_, examined_, probes_, overhead_bytes_, hash_ns_, wire_bytes_per_second_, told_};
}

std::uint64_t Scatter::Dedup::memory_bytes() const {
  std::uint64_t bytes = twins_.size() + kMostDeferred * (sizeof(Deferred) + sizeof(Reference));
  for (const auto& region : regions_) {
    bytes += region->examined.capacity() * (sizeof(wire::ContentName) + sizeof(std::uint64_t)) +
             5 * region->examined.words() * 8;
  }
  return bytes;
}

}  // namespace memferry
