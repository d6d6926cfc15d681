// The destination's engine for one migration. It knows, for each page, whether it has it; it is in one of
// these states:
//
//   filling   pages are received straight into the region's memory (nobody runs there yet); later rounds
//             overwrite; a checksum that does not fit marks the run suspect
//   paging    after kSwitch (or from the start, for post-copy): missing pages are registered with userfaultfd,
//             installed by UFFDIO_COPY and never overwritten; faults go out on the demand channel first
//   complete  every page is there; the pager has let go
//   lost      the source did not come back within recover_timeout: kLost, then the missing pages are poisoned
//   closed    missing pages are poisoned and waiters woken (paging), everything joined
//
// The fault path never needs the owner's callback thread.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "os/unique_fd.h"
#include "page/hash.h"
#include "page/keyed_hash.h"
#include "page/region.h"
#include "transfer/events.h"
#include "transfer/gather.h"
#include "transfer/known_pages.h"
#include "transfer/stage_server_address.h"
#include "wire/frame.h"

namespace memferry {

struct ReceiverConfig {
  std::vector<std::shared_ptr<Region>> regions;
  wire::MigrationId migration{};
  unsigned channels = 2;
  std::vector<wire::Token> tokens;  // as SenderConfig's
  // Discard the regions' memory now: what is there is none of the guest's (a fresh WebAssembly instance).
  bool discard_first = true;
  // Pure post-copy: paging from the start, so that switchover has nothing to register.
  bool paging_from_start = false;
  // The mode may end in paging: no huge pages and no touching ahead beyond the run at hand.
  bool may_page = false;
  bool keep_page_hashes = false;  // 8 bytes a page, for digest()
  std::chrono::milliseconds recover_timeout{60000};
  // Somebody waits for a page, and its answer has not come for so long: a cut, though the connection seems to live.
  std::chrono::milliseconds answer_timeout{30000};
  // Pages are missing, and nothing has come from the source for so long: it is asked for one, as if somebody waited.
  std::chrono::milliseconds silence_timeout{10000};
  // Between kLost and poisoning, so that the loss can be reported first.
  std::chrono::milliseconds loss_grace{250};
  // A scatter: what the source does not send here itself is gathered from these.
  std::vector<StageServer> servers;
  std::uint64_t gather_limit = 0;  // bytes/s of what is fetched ahead of the guest; 0: none
  std::uint64_t bandwidth = 0;     // bytes/s taken in over the data channels; answers to faults do not wait
  // A parked guest: nobody but the servers has it. Paging from the start.
  bool sourceless = false;
  std::uint16_t encodings =
      0;  // of pages, agreed on with the source; what a frame says beside them is refused
  // For each region (empty: for none) whether and how it starts from a base, which the source compares with its own
  // pages. kGiven: the owner puts it there after create(); kInPlace: it is there, and not discarded.
  enum class Base : std::uint8_t { kNone, kGiven, kInPlace };
  std::vector<Base> bases;
  KeyedHashKey base_key{};
  // For a parked guest: what is the same in these files is not gathered. One a region; an empty path for none.
  std::vector<BaseImage> base_images;
  // Agreed on with the source: it is told what is known here, and may send references. Not with servers.
  std::shared_ptr<KnownPages> known;
  EngineCallback on_event;
};

struct FaultStats {
  std::uint64_t count = 0;  // remote faults: asked for over the demand channel
  double p50_us = 0;
  double p99_us = 0;
  double max_us = 0;
};

struct ReceiverStats {
  std::uint64_t bytes_received = 0;
  std::uint64_t pages_received = 0;  // with content
  std::uint64_t pages_zero = 0;
  std::uint64_t pages_missing = 0;  // never received, or discarded since
  std::uint64_t pages_suspect = 0;
  FaultStats faults;
  std::uint64_t extra_memory_bytes = 0;
  std::uint64_t pages_gathered = 0;
  std::uint64_t pages_lost = 0;
  std::vector<Gather::ServerStats> servers;
  std::uint64_t pages_from_base = 0;
  std::uint64_t base_hash_us = 0;  // CPU time
  std::string base_problem;        // of base_images: why not all of them was compared
  std::uint64_t pages_known = 0;   // came as references, and were here already
  std::uint64_t pages_unresolved = 0;
};

class Receiver : public std::enable_shared_from_this<Receiver> {
 public:
  static std::shared_ptr<Receiver> create(
      ReceiverConfig config);  // throws std::invalid_argument, SystemError
  ~Receiver();                 // close()

  [[nodiscard]] const wire::MigrationId& migration() const;
  // For the listener: a hello that names this migration. True when its token is right, its epoch is not an
  // old one and its token was not used before; then the receiver takes the descriptor.
  bool attach(const wire::Hello& hello, UniqueFd& fd);

  // Every page is there and none is suspect (filling), or the pager serves (paging): prepare() may begin.
  [[nodiscard]] bool ready() const;
  // The same, and what is whole stays so: after a filling that is ready nothing that arrives is written any
  // more, the state is complete. For whoever is about to prepare the guest; false ends the migration.
  [[nodiscard]] bool seal();
  [[nodiscard]] bool paging() const;
  [[nodiscard]] ReceiverStats stats() const;
  // With servers. What cannot be had while these are away, by ordinal.
  [[nodiscard]] Gather::Reach reach(const std::vector<bool>& away) const;
  [[nodiscard]] std::vector<RegionRun> missing(std::size_t max_runs) const;
  // XXH3_128 over the hashes of the pages as they arrived (keep_page_hashes), region by region; equal to
  // Sender::digest() of the paused source.
  [[nodiscard]] Hash128 digest(std::uint32_t region) const;
  void acknowledge_loss();  // poison now
  // The nodes of the sample are: the source may compare those already where they stay as they are, else only ask how much
  // of them is alike.
  void base_sampled(bool stays);
  // The bases are where they belong, and nobody but the source writes the regions any more. Until then it may
  // compare no more than the sample, nor send pages.
  void base_ready();
  // kFilled is to come once every page is here (filling).
  void await_filled();
  // The source sends nothing for the next moment (kRest), since it waits for what is gathered: the link is the gather's.
  static constexpr std::chrono::milliseconds kRest{250};
  void source_rests();
  void set_gather_limit(std::uint64_t bytes_per_second);
  void set_bandwidth(std::uint64_t bytes_per_second);
  // Grow a region while filling (the source's WebAssembly memory grew): its memory is already there.
  void grow(std::uint32_t region, std::uint64_t pages);
  void close();  // may be called twice; from any thread but the callback's

 private:
  Receiver();
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace memferry
