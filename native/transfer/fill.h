// Receiving into memory that nobody uses yet: the rounds before switchover. Content goes straight to its
// place, in pieces that are hashed while they are still in the cache.
//
// Threads: one object for each channel, used by that channel's thread alone; they share the maps.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "fault/arrival_map.h"
#include "fault/discard.h"
#include "transfer/touch_ahead.h"
#include "wire/frame.h"
#include "wire/run_decoder.h"
#include "wire/stream.h"

namespace memferry {

class Filler {
 public:
  using Read = std::function<wire::IoResult(std::span<std::byte>)>;

  // `ahead` may be nullptr. `backings` has one entry a map.
  Filler(const std::vector<Backing>& backings, TouchAhead* ahead);

  // The payload of a kPages frame whose header has been checked. `verified` false: the pages are suspect now.
  // A payload that cannot be decoded, or is a delta of pages that are not here, makes them suspect too: another copy
  // will do. Throws SystemError when there is no memory for them.
  wire::IoResult pages(const Read& read, const wire::FrameHeader& header, ArrivalMap& map, bool& verified);
  void zeros(std::uint32_t region, ArrivalMap& map, PageRun run);

  // Forgets the pages: they are absent from memory afterwards. Gives how many had been received; sweep() must
  // follow before anyone relies on it. Throws SystemError.
  std::uint64_t discard(std::uint32_t region, ArrivalMap& map, PageRun run);
  // What is present without having been received (a suspect page, say) goes. `whole`: all that was not received, also
  // where nothing is said to be: who has read there may have put memory behind it.
  void discard_unreceived(std::uint32_t region, ArrivalMap& map, bool whole = false);
  void sweep();

 private:
  wire::IoResult receive_encoded(const Read& read, const wire::FrameHeader& header, ArrivalMap& map,
                                 bool& decoded);
  bool decode(const wire::FrameHeader& header, ArrivalMap& map, PageRun run);
  void populate(ArrivalMap& map, PageRun run) const;
  void drop_present(std::uint32_t region, ArrivalMap& map, PageRun run);

  std::vector<Discarder> discarders_;
  TouchAhead* ahead_;
  std::vector<std::uint64_t> hashes_;
  wire::RunDecoder decoder_;
  std::vector<std::byte> payload_;
  std::vector<std::byte> scattered_;  // for a run that is not contiguous in memory
};

}  // namespace memferry
