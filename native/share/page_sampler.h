// Finds out in the background what a guest of this process keeps in its memory: goes over its regions page by page,
// hashes what is there under the domain's key, and reports a page once it had the same content in two passes. What
// a reporter wants to have of such pages is read again, and given if it is still that.
//
// It takes at most a share of one core, by its thread's CPU time, at the lowest priority. While a region is on its way
// (claimed by a migration, or arriving) it looks away, so a migration is never slowed down by it, and no page is touched
// that is missing here; nor is one that is not in memory at the moment. It never writes.
//
// Memory: 8 bytes a page that was hashed, at most `most_pages` of them.
//
// Threads: one of its own; calls from any.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "os/worker_thread.h"
#include "page/content_hash.h"
#include "page/contents.h"
#include "page/region.h"
#include "page/region_reader.h"
#include "share/cpu_share.h"
#include "wire/frame.h"

namespace memferry {

// A page that the guest keeps.
struct SampledPage {
  wire::ContentName name{};
  std::uint32_t region = 0;
  PageNumber page;
};

// Who is told. On the sampler's thread, each call for a bounded time; interrupt() from any.
class SampleReporter {
 public:
  SampleReporter() = default;
  virtual ~SampleReporter() = default;
  SampleReporter(const SampleReporter&) = delete;
  SampleReporter& operator=(const SampleReporter&) = delete;
  // `wanted` becomes one for each page that is to be given, with give() and before the next report().
  virtual void report(std::span<const SampledPage> pages, std::vector<bool>& wanted) = 0;
  virtual void give(const SampledPage& page, std::span<const std::byte> bytes) = 0;
  virtual void flush() = 0;
  virtual void interrupt() = 0;
};

struct SamplerConfig {
  std::vector<std::shared_ptr<Region>> regions;
  ContentKey key{};
  double cpu_share = 0.01;                          // of one core
  std::chrono::milliseconds pass_interval{10'000};  // from the start of a pass to the next one's, at least
  std::uint64_t most_pages = 4ULL << 20;            // that are remembered
  std::shared_ptr<SampleReporter> reporter;
};

struct SamplerStats {
  std::uint64_t passes = 0;
  std::uint64_t hashed = 0;
  std::uint64_t zeros = 0;
  std::uint64_t reported = 0;
  std::uint64_t wanted = 0;
  std::uint64_t given = 0;
  std::uint64_t looked_away = 0;  // looks that were not taken, the region being on its way
  std::uint64_t cpu_ns = 0;
  std::uint64_t memory_bytes = 0;
};

class PageSampler {
 public:
  // Throws std::invalid_argument (no regions, no reporter, a share that is none), SystemError.
  explicit PageSampler(SamplerConfig config);
  ~PageSampler();
  PageSampler(const PageSampler&) = delete;
  PageSampler& operator=(const PageSampler&) = delete;

  [[nodiscard]] SamplerStats stats() const;
  // Ends its thread. Twice is fine.
  void close();

 private:
  static constexpr std::uint64_t kChunkPages = 512;
  using Chunk = std::array<std::uint64_t, kChunkPages>;  // the first 8 bytes of hashes; 0: none yet
  // A region that its owners have let go of is sampled no more.
  struct Watched {
    std::weak_ptr<Region> region;
    std::vector<std::unique_ptr<Chunk>> chunks;
  };

  void run();
  void look(std::uint32_t index, const std::shared_ptr<Region>& region, PageRun run);
  // Whether any page of the chunk that begins there is in memory: most of a large region may not be.
  bool anything_in(const std::shared_ptr<Region>& region, std::uint64_t first);
  // Each false when it is to end.
  bool pass();
  bool report();
  bool give(const SampledPage& page);
  bool rest();
  std::uint64_t* remembered(Watched& watched, PageNumber page);
  // Does it while nobody moves the region and it is there; false where that is not so.
  template <typename Look>
  bool glance(const std::shared_ptr<Region>& region, const Look& look_at);

  SamplerConfig config_;
  const ContentHasher hasher_;
  // The thread's own:
  OwnerPagemap pagemap_;
  RegionReader reader_;
  CpuShare share_;
  std::vector<Watched> watched_;
  std::uint64_t chunks_ = 0;
  std::vector<SampledPage> batch_;
  std::vector<bool> wanted_;
  std::vector<std::byte> page_;

  std::atomic<std::uint64_t> passes_{0};
  std::atomic<std::uint64_t> hashed_{0};
  std::atomic<std::uint64_t> zeros_{0};
  std::atomic<std::uint64_t> reported_{0};
  std::atomic<std::uint64_t> wanted_count_{0};
  std::atomic<std::uint64_t> given_{0};
  std::atomic<std::uint64_t> looked_away_{0};
  std::atomic<std::uint64_t> cpu_ns_{0};
  std::atomic<std::uint64_t> memory_bytes_{0};
  std::mutex close_mutex_;
  WorkerThread thread_;
};

}  // namespace memferry
