// What whoever receives guests supplies: the memory of one, and what is to happen with it. Which thread calls what:
// `prepare` from a thread of its own (mf-prepare), so that a cancelled migration need not wait for it; all others from the
// arrival's (mf-arrival), one after the other. None is called with a lock held.
//
//   accept ─ [grow ...] ─ prepare ─┬─ resume ─ [lost ...] ─┬─ complete ─┐
//                │           │     │                       └─ failed ───┼─ ended
//                └───────────┴─────┴─ abandon ─────────────────────────-┘
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "control/crypto.h"
#include "control/failure.h"
#include "page/region.h"
#include "transfer/receiver.h"

namespace memferry::control {

struct ArrivalReport {
  std::string migration;
  std::string guest;
  std::uint64_t heap_bytes = 0;
  bool verified = false;  // digests were compared, and are equal
  double prepare_ms = 0;
  double gather_ms = 0;  // from resume() until every page was here
  ReceiverStats stats;
};

class ArrivingGuest {
 public:
  ArrivingGuest() = default;
  virtual ~ArrivingGuest() = default;
  ArrivingGuest(const ArrivingGuest&) = delete;
  ArrivingGuest& operator=(const ArrivingGuest&) = delete;

  // In the order of the offer's table; the same until ended().
  [[nodiscard]] virtual const std::vector<std::shared_ptr<Region>>& regions() const = 0;
  // Makes the region's memory at least so long, and Region::grow()s it. Throws when it cannot.
  virtual void grow(std::uint32_t region, std::uint64_t length_bytes) = 0;
  // Everything that can fail. Memory that has not arrived is served while it runs. Throws why the guest cannot run here.
  virtual void prepare(ByteSpan state) = 0;
  // Lets the guest run: it is this side's for good.
  virtual void resume() noexcept = 0;
  // It has not run here and never will. `prepare` has returned.
  virtual void abandon(const Cause& cause) noexcept = 0;
  // Pages that cannot be had any more; touching one fails from the return of this on.
  virtual void lost(const std::vector<RegionRun>& runs, const std::string& why) noexcept = 0;
  // Every page is here.
  virtual void complete(const ArrivalReport& report) noexcept = 0;
  // The guest runs here, and not every page came, or not as it left the source.
  virtual void failed(const Cause& cause) noexcept = 0;
  // Nothing of the arrival is left.
  virtual void ended() noexcept = 0;
};

}  // namespace memferry::control
