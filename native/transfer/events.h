// What the engine tells its owner. Called from native threads, in order for each engine, never with a lock
// held; the callback must not block and must not call close() of the engine that calls it.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "page/range.h"

namespace memferry {

struct RegionRun {
  std::uint32_t region;
  PageRun run;
};

// Whom a page is sent to.
enum class Towards { kDestination, kServer };

enum class EngineEventKind {
  // source
  kConnected,  // every channel is up
  kRoundDone,  // tag: every page of the round is in the destination's memory
  kSwitched,   // the destination has discarded what was to be discarded, and its pager serves
  kEvicted,    // every page is in the destination's memory
  // destination
  kFirstChannel,  // the first authenticated connection is there
  kFilled,        // before the switch, after await_filled(): every page is here
  kComplete,      // every page is there, and the pager has let go of the regions
  kLost,  // pages that cannot be had any more: `lost` has them, `message` says why; they are poisoned after
          // acknowledge_loss() or the grace period. With VMD servers it may come more than once.
  kRestHere,  // after kLost, with VMD servers: what is not lost is here, and nothing more will come
  // both
  kPaused,     // post-copy: the connections were cut; redialling (source) or waiting (destination)
  kRecovered,  // post-copy: going on after kPaused
  kFailed,     // over: `code` and `message` say why
};

struct EngineEvent {
  EngineEventKind kind;
  std::uint64_t tag = 0;
  std::uint64_t suspects =
      0;             // kRoundDone: pages that the destination could not verify; already queued again
  std::string code;  // kFailed: CHANNEL_LOST, CONNECT_FAILED, PROTOCOL, REFUSED, CHECKSUM,
                     // RECOVERY_TIMEOUT, REGION_GONE, SYSTEM
  std::string message;
  std::vector<RegionRun> lost;
};

using EngineCallback = std::function<void(const EngineEvent&)>;

}  // namespace memferry
