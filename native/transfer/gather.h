// The destination's side of a scatter: pages are fetched from the VMD servers, ahead of the guest and on demand, each
// server by two connections with a thread each (GatherLink). It knows where pages are (records from the source, or
// from a server's map) and which server is to be asked for each; what to do with a page that comes is the receiver's.
//
// A page with two holders is asked for at one of them by its place, so that both are read; when that one is down, has
// failed, or does not have it, at the other. A server is *down* while a connection to it is being dialled or does not
// answer, and has *failed* when that lasted for recover_timeout or it has lost the image.
//
// Threads: two a server; calls from the channels', the pager's and the supervisor's. `mutex_` guards the servers'
// states; it is not held over a socket call or while the receiver is told. `filling_` makes one of "is this still
// the page's content, and into its place with it": whoever changes a location before the switch takes it too.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "fault/arrival_map.h"
#include "fault/demand_writer.h"
#include "fault/location_map.h"
#include "transfer/events.h"
#include "transfer/gather_base.h"
#include "transfer/stage_server_address.h"
#include "wire/bandwidth_cap.h"

namespace memferry {

class GatherLink;

class Gather {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr unsigned kIndexServers = 4;

  struct Config {
    std::vector<StageServer> servers;
    wire::MigrationId image{};
    std::chrono::milliseconds recover_timeout{60000};
    std::uint64_t page_size = 0;
    std::uint64_t limit = 0;  // bytes/s of what is fetched ahead; 0: none
    bool sourceless = false;
    std::uint16_t compressions = 0;  // what servers may pack answers to reading ahead with
    std::vector<BaseImage> base;     // sourceless only: what is the same there is not fetched; one a region
  };
  // All called without a lock of this class, from any of its threads.
  struct Receiver {
    // Pages whose content is the source's. `hashes` one a page.
    std::function<void(std::uint32_t region, PageRun run, std::span<const std::byte> bytes,
                       std::span<const std::uint64_t> hashes)>
        pages;
    std::function<void(std::uint32_t region, PageRun run)> zeros;
    // As `pages`, from the base.
    std::function<void(std::uint32_t region, PageRun run, std::span<const std::byte> bytes,
                       std::span<const std::uint64_t> hashes)>
        from_base;
    // A location became known, a server came up, went down or failed: faults that wait may be asked for now.
    std::function<void()> changed;
    // What was asked for on demand may not come from where it was asked: it is to be asked for again.
    std::function<void()> ask_again;
    // Somebody waited lately for a page that reading ahead would not have brought.
    std::function<bool()> strayed_lately;
    // The source still sends here itself: its pages go first where the link is what both wait for.
    std::function<bool()> source_sends;
    // The guest has left its source: what a page is does not change any more.
    std::function<bool()> frozen;
  };

  Gather(Config config, std::vector<ArrivalMap*> maps, Receiver receiver);
  ~Gather();  // close()
  Gather(const Gather&) = delete;
  Gather& operator=(const Gather&) = delete;
  void start();

  // A kMap frame, checked for its form and its region's pages. False: holders that cannot be. `by_source` false: a
  // server's word. It changes nothing about pages that the source has told of, and counts only where it is final: of
  // what was told before the guest left, the source has told this side as well, and what it has taken back since no
  // server knows. Servers may differ: one that the source had given up tells of where a page was before. Both places
  // are kept, and nobody's word makes a holder of a server that has denied having the page.
  bool record(std::uint32_t region, PageRun run, wire::Holders holders, bool zero,
              std::span<const std::uint64_t> hashes, bool by_source);
  // Newer content will come, or has come, by another way.
  void forget(std::uint32_t region, PageRun run);
  // Held by whoever looks at a page's location and then acts on it, before the switch.
  [[nodiscard]] std::mutex& filling() { return filling_; }
  // Whether this is what the source said of the page.
  [[nodiscard]] bool is_current(std::uint32_t region, PageNumber page, std::uint64_t hash) const;

  // Somebody waits for the run's first page; the rest is welcome. False when no server can be asked now.
  bool request(std::uint32_t region, PageRun run);
  // The same while the source is there and has it as well: asked for only of a server that is as near as the source and
  // answers at once. False otherwise.
  bool request_near(std::uint32_t region, PageRun run, DemandWriter& to_source);
  // What request_near() asked for did not come in time: whoever still owes it is asked for nothing of the kind for a
  // while.
  void late(std::uint32_t region, PageNumber page);
  // It has been asked for ahead of time, and the answer is on its way.
  [[nodiscard]] bool coming(std::uint32_t region, PageNumber page) const;
  // The source has let go of it: only a server has it.
  void set_elsewhere(std::uint32_t region, PageNumber page);
  [[nodiscard]] bool elsewhere(std::uint32_t region, PageNumber page) const;
  void wake_ahead();  // what receiver says of the source has changed
  void set_limit(std::uint64_t bytes_per_second) { limit_.set_rate(bytes_per_second); }

  // Asks the index servers that are up for everything that they know.
  void fetch_map();
  // Of the pages that are missing, one without a location with a server that has not failed; nullopt: all have one.
  [[nodiscard]] std::optional<RegionRun> first_uncovered() const;
  // Missing pages that no server will give: those whose holders have failed, and, when `no_source`, those without
  // a location as well once a map was fetched since `map_since` or nobody is left to fetch it from. `names` gets the
  // servers that had them. A map that is older than a server's failure, or a page's denial, is none for that page; and
  // who has denied a page is asked once more before it is given up. From one thread at a time.
  [[nodiscard]] std::vector<RegionRun> hopeless(bool no_source, Clock::time_point map_since,
                                                std::vector<std::string>& names, std::size_t max_runs);

  struct ServerStats {
    std::uint64_t pages = 0;
    std::uint64_t bytes = 0;
    std::string failed;
  };
  [[nodiscard]] std::vector<ServerStats> stats() const;
  // Of the pages that are still to come, with these servers away (by ordinal).
  struct Reach {
    std::uint64_t away = 0;     // nobody else has them
    std::uint64_t unknown = 0;  // nobody has said yet where they are
  };
  [[nodiscard]] Reach reach(const std::vector<bool>& away) const;
  [[nodiscard]] std::uint64_t memory_bytes() const;
  [[nodiscard]] GatherBase::Stats base_stats() const;

  // Wakes and ends everything; close() also joins.
  void shut_down();
  void close();

 private:
  friend class GatherBase;
  friend class GatherLink;
  struct Server {
    const StageServer* address = nullptr;
    std::uint8_t ordinal = 0;
    std::unique_ptr<GatherLink> ahead;
    std::unique_ptr<GatherLink> demand;
    std::vector<std::unique_ptr<AtomicBitmap>> todo;  // located here, to be fetched ahead; one a region
    std::vector<std::unique_ptr<AtomicBitmap>>
        denied;                   // asked for, and not here; one a region; guarded by records_
    std::atomic<bool> up{false};  // both of its connections are there
    std::atomic<bool> failed{false};
    std::atomic<std::uint64_t> pages{0};
    std::atomic<std::uint64_t> bytes{0};
    std::atomic<unsigned> wrong{0};
    std::atomic<bool> told_hashes{false};   // it has answered what its pages are
    std::atomic<Clock::rep> late_until{0};  // asked for nothing that the source has until then
    Clock::duration answers_within{};       // on average, to whoever waits; the demand link's
    // Guarded by mutex_:
    std::array<bool, wire::kStageRoles> connected{};  // by role
    std::string why;
    Clock::time_point last_good;
    Clock::time_point map_at{};  // when the newest map was asked for that is here in full
  };
  [[nodiscard]] bool usable(std::uint8_t ordinal) const;
  // Who is to be asked for it ahead of time; kNobody when all its holders have failed.
  [[nodiscard]] std::uint8_t chosen(PageNumber page, wire::Holders holders) const;
  void assign(std::uint32_t region, PageNumber page);
  void follow_faults(GatherCursor& cursor) const;
  [[nodiscard]] wire::Holders told_by_server(std::uint32_t region, PageNumber page, wire::Holders told,
                                             wire::Holders holders, std::uint64_t hash);
  void deny(Server& server, std::uint32_t region, PageNumber page);
  [[nodiscard]] bool denied(const Server& server, std::uint32_t region, PageNumber page) const;
  enum class Doubt { kNone, kAskOnce, kAskedTwice };  // whether somebody has denied having it
  [[nodiscard]] Doubt doubted(std::uint32_t region, PageNumber page);
  void ask_twice(const std::vector<RegionRun>& pages);
  static void raise(std::atomic<Clock::rep>& latest, Clock::time_point to);
  [[nodiscard]] bool maps_since(Clock::time_point since) const;
  void reassign_all(Server& from);
  void rebalance();
  bool not_held(std::uint8_t ordinal, std::uint32_t region, PageRun run,
                std::span<const std::uint64_t> expected);
  void spare(Server& server) const;
  // For links.
  void answered_demand(Server& server, Clock::duration took) const;
  void link_up(Server& server, wire::StageRole role);
  void link_down(Server& server, wire::StageRole role);
  bool link_failed(Server& server, const std::string& why, bool for_good);  // true: given up
  void fail(Server& server, const std::string& why);
  // `expected`: their hashes when they were asked for.
  void came(Server& server, std::uint32_t region, PageRun run, std::span<const std::byte> bytes,
            std::span<const std::uint64_t> hashes, std::span<const std::uint64_t> expected);
  void map_done(Server& server, Clock::time_point asked);

  const Config config_;
  const std::vector<ArrivalMap*> maps_;
  const Receiver receiver_;
  std::vector<std::unique_ptr<LocationMap>> where_;
  std::vector<std::unique_ptr<AtomicBitmap>> elsewhere_;
  std::unique_ptr<GatherBase> base_;  // where there is one; outlives the links, which have checks of it
  std::vector<std::unique_ptr<Server>> servers_;
  wire::BandwidthCap limit_;
  std::atomic<std::uint64_t> cursor_{0};  // region << 48 | page: behind the last fault
  std::atomic<std::uint64_t> cursor_moves_{0};
  std::atomic<bool> replicas_{false};        // there are pages of two holders
  std::atomic<bool> rebalance_{false};       // a server came up since they were given out
  std::atomic<Clock::rep> yield_until_{0};   // nothing is fetched ahead until then: the link is the source's
  std::atomic<unsigned> reading_ahead_{0};   // requests outstanding over all servers
  std::atomic<Clock::rep> failed_at_{0};     // when a server failed last
  std::atomic<Clock::rep> displaced_at_{0};  // when a page's last holder denied having it, the last time
  std::mutex filling_;
  mutable std::mutex records_;  // one writer of a location at a time
  // Guarded by records_: pages that were denied, and are asked for once more; one a region, made at the first.
  std::vector<std::unique_ptr<AtomicBitmap>> asked_twice_;
  std::atomic<bool> denials_{false};  // there are such
  mutable std::mutex mutex_;          // guards what is marked so
  std::atomic<bool> closing_{false};
};

}  // namespace memferry
