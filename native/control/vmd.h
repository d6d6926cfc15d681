// A VMD's client: has a parked guest back. What src/destination/unpark.ts does, for callers that wait.
//
// Threads: one caller at a time for each object; pages move on the engines' own.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "control/messages.h"
#include "control/stage_client.h"
#include "control/staged_image.h"
#include "os/worker_thread.h"
#include "page/region.h"
#include "transfer/receiver.h"

namespace memferry::control {

struct VmdAddress {
  std::string host;  // numeric
  std::uint16_t port = 0;
};
// "127.0.0.1:7000", "[::1]:7000". Throws std::invalid_argument.
[[nodiscard]] VmdAddress parse_address(const std::string& text);

class ParkedImage {
 public:
  // Claims the guest of a ticket; nobody else has it while this is there. Servers that are away are waited for before that,
  // for the connect timeout. Throws Failure: VMD_REFUSED, VMD_LOST, ...
  ParkedImage(const std::string& ticket, VmdOptions options);
  ~ParkedImage();  // what was not granted goes back
  ParkedImage(const ParkedImage&) = delete;
  ParkedImage& operator=(const ParkedImage&) = delete;

  [[nodiscard]] const OfferedGuest& guest() const { return guest_; }
  [[nodiscard]] const Bytes& state() const { return state_; }
  // From its return on pages are served.
  void serve(const std::vector<std::shared_ptr<Region>>& regions, EngineCallback on_event);
  [[nodiscard]] Receiver& receiver() const;
  // The commit: from its return on the guest is the caller's. MIGRATION_IN_DOUBT: nobody knows; it does not run here.
  // CONNECT_FAILED, PEER_LOST, VMD_LOST: a server is away that has pages which no other has; it was not asked for.
  void grant();
  [[nodiscard]] bool granted() const { return granted_; }
  // Every page is here and is what left the source: the image goes.
  void verify_and_dissolve();

 private:
  [[nodiscard]] Json claim_json() const;
  void require_within_reach() const;

  const VmdOptions options_;
  wire::MigrationId id_{};
  std::unique_ptr<StagedImage> image_;
  std::string claimant_;
  std::uint32_t epoch_ = 0;
  bool claimed_ = false;
  bool granted_ = false;
  std::optional<std::vector<std::string>> digests_;
  OfferedGuest guest_;
  Bytes state_;
  std::shared_ptr<Receiver> receiver_;
  std::unique_ptr<WorkerThread> telling_;  // the servers other than home that somebody has resumed; or null
};

}  // namespace memferry::control
