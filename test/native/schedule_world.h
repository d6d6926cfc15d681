// What there is in a schedule that is being carried out: servers, guests on their way, what has struck, and, computed
// from that, what may be lost.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "faulty_server.h"
#include "sanitized.h"
#include "scatter_guest.h"
#include "schedule.h"
#include "transfer/receiver.h"
#include "transfer/sender.h"

namespace memferry::test {

class ScheduleWorld {
 public:
  using Clock = std::chrono::steady_clock;
  using Way = Schedule::Way;
  using FaultKind = Schedule::FaultKind;
  using When = Schedule::When;
  using ms = std::chrono::milliseconds;

  // A schedule that takes longer hangs.
  static constexpr std::chrono::seconds kBound{kSanitized ? 60 : 20};

  enum class Outcome : std::uint8_t {
    kComplete,
    kLost,    // what faults allow, named
    kStayed,  // failed before the commit; the source has its guest
    kClosed,  // the destination was closed in the middle
  };
  static constexpr std::size_t kOutcomes = 4;

  explicit ScheduleWorld(const Schedule& schedule) : schedule_(schedule), deadline_(Clock::now() + kBound) {}

  [[nodiscard]] bool failed() const { return !failures_.empty(); }
  [[nodiscard]] std::string failures() const {
    std::string all;
    for (const std::string& each : failures_) all += "  " + each + "\n";
    return all;
  }
  [[nodiscard]] std::vector<Outcome> outcomes() const {
    std::vector<Outcome> all;
    for (const auto& each : migrations_) all.push_back(each->outcome);
    return all;
  }
  [[nodiscard]] std::vector<FaultKind> struck() const {
    std::vector<FaultKind> all;
    for (const Strike& each : faults_) {
      if (each.struck) all.push_back(each.fault->kind);
    }
    return all;
  }
  [[nodiscard]] std::uint64_t pages_deduplicated() const {
    std::uint64_t all = 0;
    for (const auto& each : migrations_) all += each->deduplicated;
    return all;
  }
  [[nodiscard]] std::uint64_t pages_gathered() const {
    std::uint64_t all = 0;
    for (const auto& each : migrations_) all += each->gathered;
    return all;
  }
  [[nodiscard]] std::uint64_t remote_faults() const {
    std::uint64_t all = 0;
    for (const auto& each : migrations_) all += each->remote_faults;
    return all;
  }
  // Servers that a source has given up though nothing had happened to them.
  [[nodiscard]] std::uint64_t given_up_for_nothing() const { return given_up_for_nothing_; }
  [[nodiscard]] std::uint64_t audits() const { return audits_; }
  // How everything stands, for a schedule that hangs. From any thread.
  [[nodiscard]] std::string state() {
    std::string text;
    for (const auto& each : migrations_) {
      text += "  guest " + std::to_string(each->index) + ", " + each->step.load();
      if (each->has_sender) {
        const SenderStats stats = each->sender->stats();
        text += "; source: sent " + std::to_string(stats.pages_sent) + "+" +
                std::to_string(stats.pages_zero) + ", pending " + std::to_string(stats.pages_pending) +
                ", direct " + std::to_string(stats.pages_direct) + ", redials " +
                std::to_string(stats.redials);
        for (const auto& server : stats.servers)
          text += ", [" + std::to_string(server.pages) + " " + server.failed + "]";
      }
      if (each->has_receiver) {
        const ReceiverStats stats = each->receiver->stats();
        text += "; destination: missing " + std::to_string(stats.pages_missing) + ", gathered " +
                std::to_string(stats.pages_gathered) + ", lost " + std::to_string(stats.pages_lost);
        for (const auto& server : stats.servers)
          text += ", [" + std::to_string(server.pages) + " " + server.failed + "]";
      }
      text += "\n";
    }
    for (const Strike& each : faults_)
      text += std::string("  ") + name_of(each.fault->kind) +
              (each.struck ? " has struck\n" : " has not struck\n");
    return text;
  }

 protected:
  // Timeouts: short, but long enough for a machine that is busy with seven more of these.
  static constexpr int kSlow = kSanitized ? 3 : 1;
  static constexpr ms kStall{500 * kSlow};
  static constexpr ms kChainStall{2500 * kSlow};
  static constexpr ms kRecover{1200 * kSlow};
  static constexpr ms kRecoverFromPause{2500 * kSlow};
  static constexpr ms kSourceRecover{2500 * kSlow};
  // By then a source has seen that a server's connections are gone, and has sent its pages again.
  static constexpr ms kNoticed{150 * kSlow};
  static constexpr ms kGatherPatience{kSanitized ? 12'000 : 10'000};

  struct Server {
    Server(unsigned ordinal_in, bool network) : ordinal(ordinal_in), vmd(ordinal_in, network) {}
    const unsigned ordinal;
    FaultyServer vmd;
    std::mutex looking;  // one observer at a time: the next one's connection ends the former's
    // Guarded by ScheduleRun::mutex_:
    bool gone = false;                        // what it held is lost
    bool silent = false;                      // and nobody can tell
    bool disturbed = false;                   // it may not have been given what it should have
    Clock::time_point gone_at{};              // for all to see
    std::array<std::set<PageId>, 3> spoiled;  // by guest
  };
  struct Strike {
    const Schedule::Fault* fault;
    std::atomic<bool> done{false};
    std::atomic<bool> struck{false};
    std::atomic<Clock::rep> ends{0};  // of one that takes a while
    explicit Strike(const Schedule::Fault* of) : fault(of) {}
    Strike(Strike&& other) noexcept : fault(other.fault) {}
  };
  struct Migration {
    Migration(const Schedule& schedule, unsigned index_in, const std::vector<std::uint16_t>& ports,
              const std::vector<std::uint64_t>& identities)
        : index(index_in),
          plan(schedule.guests[index_in]),
          guest(plan, schedule.seed * 3 + index_in,
                schedule.way == Way::kScatterHybrid || schedule.way == Way::kScatterPreCopy) {
      source_servers = server_addresses(image, kSourceSession, ports, FaultyServer::kAttempts, identities);
      destination_servers = server_addresses(image, kDestinationSession, ports, FaultyServer::kAttempts);
    }
    const unsigned index;
    const Schedule::Guest& plan;
    ScatterGuest guest;
    const ImageId image = own_image_id(static_cast<std::uint8_t>(index));
    std::vector<StageServer> source_servers;
    std::vector<StageServer> destination_servers;
    EventBox departures;
    EventBox arrivals;
    std::unique_ptr<Forwarder> network;  // between source and destination, where faults need one
    std::unique_ptr<Sender> sender;
    std::shared_ptr<Receiver> receiver;
    std::unique_ptr<Listener> listener;
    std::atomic<bool> has_sender{false};
    std::atomic<bool> has_receiver{false};
    std::atomic<const char*> step{"at the start"};
    std::atomic<Clock::rep> hurry_at{0};
    std::atomic<bool> source_killed{false};
    std::atomic<bool> destination_closed{false};
    std::atomic<bool> direct_disturbed{false};
    std::atomic<bool> source_killed_early{false};
    std::atomic<bool> evicted{false};
    // To the destination: it may take nothing for so long that it counts as stalled.
    [[nodiscard]] bool slow() const { return plan.intake_limit > 0; }
    bool committed = false;
    std::optional<Clock::time_point> settled_at;  // the source says that it is not needed any more
    std::vector<RegionRun> missing;               // at the destination, when its source said that it is done
    std::vector<std::string> given_up;            // servers, by the source at settled_at: why
    std::uint64_t single = 0;                     // pages with one copy, by the source at settled_at
    // The sender's callback writes it before whoever waits for the event gets it, as `missing`.
    struct Done {
      Clock::time_point at;
      std::vector<std::string> given_up;
      std::uint64_t single;
    };
    std::optional<Done> done;  // when the source said so last
    std::set<PageId> lost;
    Outcome outcome = Outcome::kStayed;
    std::uint64_t gathered = 0;
    std::uint64_t deduplicated = 0;
    std::uint64_t remote_faults = 0;
  };

  static bool needs_network(FaultKind kind) {
    return kind == FaultKind::kServerSilent || kind == FaultKind::kServerPauses ||
           kind == FaultKind::kServerCut || kind == FaultKind::kServerFlips;
  }

  void fail(const std::string& what) {
    const std::lock_guard lock(mutex_);
    failures_.push_back(what);
  }
  void fail(const Migration& of, const std::string& what) {
    fail("guest " + std::to_string(of.index) + ", " + of.step.load() + ": " + what);
  }
  std::string why(const Migration& of) {
    const std::lock_guard lock(mutex_);
    return why_[of.index];
  }

  // A server takes its copy of a page along when it ends or keeps other bytes, but not where the source had given it up
  // by the time that it was done: then the page went elsewhere, while the source had it. So a page may be lost where
  //
  //   - every server is lost that has the map of where pages are, and had not been given up; or
  //   - one copy is all that is asked for, and one server is lost; or
  //   - two are asked for, and two servers are lost, which may be the page's; or
  //   - two are asked for, one server is lost, and it may have been the page's only one: the source has said that some
  //     have one copy, for which there must be a reason (below), or it had let go of its memory before it gave one up.
  //
  // A server that was merely cut, paused or sent other bits excuses nothing, unless it was given up for it.
  bool may_lose(const Migration& of, const PageId& page) {
    if (of.source_killed_early) return true;
    const std::lock_guard lock(mutex_);
    unsigned lost_ones = 0;
    unsigned index = 0;
    unsigned index_lost = 0;
    bool any_given_up = false;
    for (const auto& server : servers_) {
      const bool given_up = server->ordinal < of.given_up.size() && !of.given_up[server->ordinal].empty();
      bool lost = server->gone;
      // The source has seen it in time, and still had everything.
      if (lost && given_up && !of.plan.release_as_evicted && of.settled_at &&
          *of.settled_at - server->gone_at > kNoticed) {
        lost = false;
      }
      any_given_up = any_given_up || given_up;
      if (server->ordinal < Schedule::kIndexServers && !given_up) {
        ++index;
        index_lost += lost ? 1 : 0;
      }
      lost = lost || server->spoiled[of.index].count(page) > 0;
      lost_ones += lost ? 1 : 0;
    }
    if (lost_ones == 0) return false;
    if (schedule_.replicas == 1 || lost_ones > 1 || (index > 0 && index_lost == index)) return true;
    return of.single > 0 || (of.plan.release_as_evicted && any_given_up);
  }
  // One copy does where fewer than two servers live that the source had not given up, and, where fewer than two have
  // room, as long as the destination takes nothing, or, of what had two, in a park. And of what the source had let go of.
  bool may_be_single(const Migration& of) {
    const std::lock_guard lock(mutex_);
    unsigned living = 0;
    unsigned takers = 0;
    for (const auto& server : servers_) {
      const bool given_up = server->ordinal < of.given_up.size() && !of.given_up[server->ordinal].empty();
      living += given_up ? 0 : 1;
      takers += given_up || is_small(*server) ? 0 : 1;
    }
    if (living < 2) return true;
    const bool any_given_up = living < servers_.size();
    if (of.plan.release_as_evicted && any_given_up) return true;
    return takers < 2 && (schedule_.way == Way::kPark ? any_given_up : of.direct_disturbed || of.slow());
  }
  bool may_lose_anything(const Migration& of) {
    bool any = false;
    of.guest.each_page([&](std::uint32_t region, std::uint64_t page) {
      any = any || may_lose(of, {region, page});
    });
    return any;
  }
  bool may_stay(const Migration& of) {
    if (of.source_killed || of.destination_closed || of.direct_disturbed) return true;
    const SenderStats stats = of.sender->stats();
    unsigned takers = 0;
    unsigned living = 0;
    bool nobody_knows = true;
    {
      const std::lock_guard lock(mutex_);
      for (const auto& server : servers_) {
        const bool given_up = server->ordinal < stats.servers.size() &&
                              !stats.servers[server->ordinal].failed.empty() && server->disturbed;
        living += server->gone || given_up ? 0 : 1;
        takers += server->gone || given_up || is_small(*server) ? 0 : 1;
        if (server->ordinal < Schedule::kIndexServers)
          nobody_knows = nobody_knows && (server->gone || given_up);
      }
    }
    if (nobody_knows && schedule_.way == Way::kPark) return true;
    // There is no room, or not for two copies.
    if (schedule_.way == Way::kPark && takers < 2 && schedule_.replicas == 2 && living > 1) return true;
    if (takers == 0) return schedule_.way == Way::kPark || !of.has_sender || all_gone();
    return schedule_.way == Way::kScatterPreCopy && may_lose_anything(of);
  }
  bool all_gone() {
    const std::lock_guard lock(mutex_);
    return std::all_of(servers_.begin(), servers_.end(), [](const auto& server) { return server->gone; });
  }
  bool is_small(const Server& server) const {
    return std::any_of(schedule_.faults.begin(), schedule_.faults.end(), [&](const Schedule::Fault& each) {
      return each.kind == FaultKind::kServerSmall && each.server == server.ordinal;
    });
  }

  const Schedule& schedule_;
  const Clock::time_point deadline_;
  std::vector<std::unique_ptr<Server>> servers_;
  std::vector<std::unique_ptr<Migration>> migrations_;
  std::vector<Strike> faults_;
  std::atomic<bool> over_{false};
  std::atomic<std::uint64_t> strikes_{0};
  std::atomic<std::uint64_t> audits_{0};
  std::atomic<std::uint64_t> given_up_for_nothing_{0};
  std::mutex mutex_;  // guards the rest, and what is marked so
  std::vector<std::string> failures_;
  std::map<unsigned, std::string> why_;
};

}  // namespace memferry::test
