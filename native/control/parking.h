// A guest that stands goes to VMD servers, and stays there until somebody claims it: what src/source/park.ts does, for
// callers that wait. Until the commit it is the caller's, and whatever fails leaves it so.
//
//   Parking (the image is made at every server) - evict (pages, digests, state; then the commit) -+- parked
//                                                        |                                        +- in doubt - evict (asks)
//                                                        +- fails: the servers let go of it
//
// Threads: cancel() and stats() from any; the rest one caller at a time. Pages move on the engine's own.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "control/messages.h"
#include "control/park_commit.h"
#include "control/placement.h"
#include "control/staged_image.h"
#include "control/vmd.h"
#include "page/region.h"
#include "transfer/sender.h"

namespace memferry::control {

struct ParkOptions {
  VmdOptions vmd;
  std::vector<VmdAddress> servers;  // in the image's order, as far as they answer; the first is home
  OfferedGuest guest;               // its regions: names; the lengths are the memory's
  unsigned replicas = 1;
  std::uint64_t bandwidth = 0;
  wire::Compress compress = wire::Compress::kOff;
  std::chrono::milliseconds lease{60000};
  std::chrono::milliseconds stall_timeout{3000};
  std::chrono::milliseconds ready_timeout{10000};
};

class Parking {
 public:
  // Throws Failure: CONNECT_FAILED (no server answers), VMD_CAPACITY, AUTH_FAILED, PLAINTEXT_REQUIRED, ...;
  // std::invalid_argument. Then nothing of it is anywhere.
  Parking(ParkOptions options, const std::vector<std::shared_ptr<Region>>& regions, Bytes state);
  ~Parking();  // what was not committed is let go of
  Parking(const Parking&) = delete;
  Parking& operator=(const Parking&) = delete;

  // JSON; claims the guest once it is parked.
  [[nodiscard]] const std::string& ticket() const { return ticket_; }
  // From its return on the guest is whoever's claims it. Throws Failure: MIGRATION_IN_DOUBT (called again it asks again),
  // GUEST_LOST (the home server was restarted after the commit had begun); with anything else the guest is the caller's, and
  // this is over.
  void evict();
  // Ends an evict() that has not begun to commit. It does not wait.
  void cancel() noexcept;
  // After evict(), whatever that has thrown: the guest may be the home server's.
  [[nodiscard]] bool granted() const { return commit_ && commit_->committed(); }

  struct Stats {
    SenderStats sender;
    double eviction_ms = 0;  // of evict(), until it was parked; 0 before
  };
  [[nodiscard]] Stats stats() const;

 private:
  using Clock = std::chrono::steady_clock;
  enum class Phase : std::uint8_t { kNew, kEvicting, kInDoubt, kParked, kOver };
  struct Progress;  // what the engine has told

  void make_image(std::vector<std::unique_ptr<StageClient>> clients);
  [[nodiscard]] SenderConfig sender_config() const;
  [[nodiscard]] std::string make_ticket() const;
  void move_out();
  void settle();
  [[nodiscard]] std::uint64_t round();
  void await(bool (*there)(const Progress&, std::uint64_t tag), std::uint64_t tag);
  [[nodiscard]] std::vector<bool> failed_servers() const;  // throws Failure: home is among them
  void stop_if_cancelled() const;
  void conclude(const ParkCommit::Settlement& settlement);
  void give_back() noexcept;
  void cancel_at_home();

  ParkOptions options_;
  const std::vector<std::shared_ptr<Region>> regions_;
  std::shared_ptr<const Bytes> state_;
  wire::MigrationId id_{};
  Key secret_{};
  std::string ticket_;
  std::atomic<Phase> phase_{Phase::kNew};
  std::atomic<bool> cancelled_{false};
  std::atomic<bool> unwinding_{false};  // from here on nobody cancels what is asked of servers
  std::atomic<double> eviction_ms_{0};
  std::shared_ptr<Progress> progress_;
  std::unique_ptr<StagedImage> image_;
  std::unique_ptr<ParkCommit> commit_;
  std::unique_ptr<Sender> sender_;
  std::uint64_t tag_ = 0;
  bool committing_ = false;  // PREPARE may have been sent
  Clock::time_point began_{};
};

}  // namespace memferry::control
