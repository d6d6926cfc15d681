#include "share/page_sampler.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "os/mapping.h"
#include "os/thread_clock.h"
#include "page/racy_read.h"
#include "page/zero.h"

namespace memferry {
namespace {

// Looked at in one go, some 50 us: so long a migration that begins may wait for it.
constexpr std::uint64_t kLookPages = 16;
constexpr std::size_t kBatch = 512;
// CPU time between two rests.
constexpr std::uint64_t kSliceNs = 300'000;
constexpr int kLowest = 19;

std::uint64_t steady_ns() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
}

}  // namespace

PageSampler::PageSampler(SamplerConfig config)
    : config_(std::move(config)),
      hasher_(config_.key),
      pagemap_(kChunkPages),
      share_(config_.cpu_share, steady_ns()),
      page_(system_page_size()) {
  if (config_.regions.empty() || !config_.reporter) throw std::invalid_argument("a sampler of nothing");
  if (!(config_.cpu_share > 0) || config_.cpu_share > 1) throw std::invalid_argument("cpuShare: 0 to 1");
  for (const auto& region : config_.regions) {
    if (!region) throw std::invalid_argument("a region is missing");
    watched_.push_back({region, {}});
  }
  config_.regions.clear();
  batch_.reserve(kBatch);
  thread_.start("mf-sample", [this](WorkerThread&) { run(); });
}

PageSampler::~PageSampler() { close(); }

void PageSampler::close() {
  const std::lock_guard lock(close_mutex_);
  thread_.request_stop();
  config_.reporter->interrupt();
  thread_.stop();
}

SamplerStats PageSampler::stats() const {
  return {passes_, hashed_, zeros_, reported_, wanted_count_, given_, looked_away_, cpu_ns_, memory_bytes_};
}

void PageSampler::run() {
  (void)set_this_thread_nice(kLowest);
  try {
    while (!thread_.stopping()) {
      const std::uint64_t began = steady_ns();
      if (!pass()) break;
      ++passes_;
      const std::uint64_t next =
          began + static_cast<std::uint64_t>(std::chrono::nanoseconds(config_.pass_interval).count());
      if (const std::uint64_t now = steady_ns(); now < next)
        (void)thread_.wait(static_cast<int>((next - now) / 1'000'000 + 1));
    }
  } catch (const std::exception&) {
    // No memory, or no pagemap: nothing more is known of this guest, and nobody depends on it.
  }
  cpu_ns_ = thread_cpu_ns();
}

bool PageSampler::pass() {
  for (std::uint32_t i = 0; i < watched_.size(); ++i) {
    for (std::uint64_t first = 0;; first += kLookPages) {
      // Anew each time: it may grow, or go.
      const std::shared_ptr<Region> region = watched_[i].region.lock();
      if (!region || region->retired() || first >= region->pages()) break;
      const bool empty = first % kChunkPages == 0 && !anything_in(region, first);
      if (empty) first += kChunkPages - kLookPages;
      if (!empty) look(i, region, {PageNumber{first}, std::min(kLookPages, region->pages() - first)});
      if (batch_.size() + kLookPages > kBatch && !report()) return false;
      if (!rest()) return false;
    }
  }
  return report();
}

template <typename Look>
bool PageSampler::glance(const std::shared_ptr<Region>& region, const Look& look_at) {
  try {
    const RegionUse use(region, "sample");
    if (!region->begin_glance()) {
      ++looked_away_;
      return false;
    }
    struct End {
      Region& region;
      ~End() { region.end_glance(); }
    } const end{*region};
    look_at(use);
    return true;
  } catch (const RegionGone&) {
    return false;
  } catch (const OwnerGone&) {
    return false;
  }
}

bool PageSampler::anything_in(const std::shared_ptr<Region>& region, std::uint64_t first) {
  bool any = false;
  (void)glance(region, [&](const RegionUse&) {
    const std::uint64_t end = std::min(first + kChunkPages, region->pages());
    for (std::uint64_t at = first; at < end && !any;) {
      const PageRun part = region->contiguous_run({PageNumber{at}, end - at});
      pagemap_.of(*region).present(region->owner_address(part.first), part.count * region->page_size(),
                                   [&](AddressRange) { any = true; });
      at += part.count;
    }
  });
  return any;
}

// What is present is looked up and read in one glance: in between nothing of it can have become missing.
void PageSampler::look(std::uint32_t index, const std::shared_ptr<Region>& region, PageRun run) {
  Watched& watched = watched_[index];
  (void)glance(region, [&](const RegionUse& use) {
    for (PageNumber at = run.first; at < run.end();) {
      const PageRun part = region->contiguous_run({at, run.end().value - at.value});
      const OwnerAddress start = region->owner_address(part.first);
      pagemap_.of(*region).present(start, part.count * region->page_size(), [&](AddressRange range) {
        for (OwnerAddress each = range.start; each < range.end && !use.revoked();
             each = each.plus(region->page_size())) {
          const PageNumber page{at.value + (each.value - start.value) / region->page_size()};
          reader_.reset();
          const RacyView view(reader_.read(*region, {page, 1}));
          if (is_zero(view.bytes())) {
            ++zeros_;
            continue;
          }
          std::uint64_t* const before = remembered(watched, page);
          if (before == nullptr) return;
          const ContentDigest digest = hasher_(view.bytes());
          ++hashed_;
          SampledPage sampled{{}, index, page};
          std::memcpy(sampled.name.data(), digest.data(), sizeof sampled.name);
          // 0 stands for none: one in 2^64 pages is never reported.
          if (*before == sampled.name[0] && *before != 0) batch_.push_back(sampled);
          *before = sampled.name[0];
        }
      });
      at.value += part.count;
    }
  });
}

std::uint64_t* PageSampler::remembered(Watched& watched, PageNumber page) {
  const auto at = static_cast<std::size_t>(page.value / kChunkPages);
  if (at >= watched.chunks.size()) watched.chunks.resize(at + 1);
  std::unique_ptr<Chunk>& chunk = watched.chunks[at];
  if (!chunk) {
    if ((chunks_ + 1) * kChunkPages > std::max(config_.most_pages, kChunkPages)) return nullptr;
    chunk = std::make_unique<Chunk>();
    ++chunks_;
    memory_bytes_ = chunks_ * sizeof(Chunk);
  }
  return &(*chunk)[static_cast<std::size_t>(page.value % kChunkPages)];
}

bool PageSampler::report() {
  if (batch_.empty()) return !thread_.stopping();
  wanted_.assign(batch_.size(), false);
  config_.reporter->report(batch_, wanted_);
  reported_ += batch_.size();
  for (std::size_t i = 0; i < batch_.size(); ++i) {
    if (wanted_[i] && !give(batch_[i])) return false;
  }
  config_.reporter->flush();
  batch_.clear();
  return rest();
}

// Copied before it is hashed: what is given is what was hashed, whatever the guest does meanwhile.
bool PageSampler::give(const SampledPage& sampled) {
  ++wanted_count_;
  const std::shared_ptr<Region> region = watched_[sampled.region].region.lock();
  bool same = false;
  if (region)
    (void)glance(region, [&](const RegionUse&) {
      pagemap_.of(*region).present(
          region->owner_address(sampled.page), region->page_size(), [&](AddressRange) {
            reader_.reset();
            const std::span<const std::byte> part = reader_.read(*region, {sampled.page, 1});
            racy_copy(page_.data(), part.data(), part.size());
            const ContentDigest digest = hasher_(page_);
            same = std::memcmp(digest.data(), sampled.name.data(), sizeof sampled.name) == 0;
          });
    });
  if (same) {
    config_.reporter->give(sampled, page_);
    ++given_;
  }
  return rest();
}

// Whatever this thread has done counts, the reporter's sockets too.
bool PageSampler::rest() {
  const std::uint64_t cpu = thread_cpu_ns();
  const std::uint64_t used = cpu - cpu_ns_;
  if (used >= kSliceNs) {
    cpu_ns_ = cpu;
    const std::uint64_t wait = share_.wait_ns(used, steady_ns());
    if (wait > 0) (void)thread_.wait(static_cast<int>(wait / 1'000'000 + 1));
  }
  return !thread_.stopping();
}

}  // namespace memferry
