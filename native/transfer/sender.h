// The source's engine for one migration: data channels, demand service and recovery, each on threads of its
// own. TypeScript decides what happens next; the sender moves bytes.
//
// Work is a `pending` bitmap for each region. Channels take the next run of pending pages at the cursor, a
// fault takes its page out of turn and moves the cursor behind it. Every page taken goes out exactly once
// until it is queued again, which is legal only after a barrier (start_round's kRoundDone).
//
// Life: construct, connect() -> kConnected, then rounds:
//   queue_populated()/queue_dirty() ; start_round(tag) -> kRoundDone{tag}
// Between queue_populated() and the first round, where the destination has a base:
//   probe(tag), compare_base(tag), end_base(tag), each -> kRoundDone{tag}
// stop-and-copy and pre-copy end there. Post-copy and hybrid go on:
//   discard_dirty()  (any number of times while the guest runs; each is a round of discards only)
//   ... guest paused ...  switch_over() -> kSwitched   (demand faults are served from here on)
//   start_push() -> kEvicted
// Before switch_over() any cut is kFailed. After it, a cut is kPaused, redial with the next epoch, exchange
// of bitmaps, kRecovered; past recover_timeout kFailed RECOVERY_TIMEOUT (the sender keeps every page).
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "page/content_hash.h"
#include "page/hash.h"
#include "page/keyed_hash.h"
#include "page/region.h"
#include "track/dirty_tracker.h"
#include "transfer/base_comparison.h"
#include "transfer/dedup_stats.h"
#include "transfer/events.h"
#include "transfer/stage_server_address.h"
#include "wire/codec_choice.h"
#include "wire/frame.h"

namespace memferry {

struct SenderConfig {
  std::vector<std::shared_ptr<Region>> regions;
  std::vector<std::shared_ptr<DirtyTracker>> trackers;  // one a region, or nullptr: never collected
  std::string host;                                     // numeric address
  std::uint16_t port = 0;
  wire::MigrationId migration{};
  unsigned channels = 2;  // 1..16
  std::vector<wire::Token>
      tokens;                   // [epoch * (channels + 1) + channel], the demand channel's last in each row;
                                // of several rows the last is a key (wire/later_tokens.h)
  std::uint64_t bandwidth = 0;  // bytes/s over all channels; 0: none. Faults debit it but never wait.
  std::chrono::milliseconds connect_timeout{5000};
  std::chrono::milliseconds recover_timeout{60000};
  std::chrono::milliseconds answer_timeout{
      30000};  // for the answer to a barrier or to kSwitch, without a sign of progress
  // For the data senders to finish their chunk and say goodbye; whoever is stuck longer is cut off.
  std::chrono::milliseconds goodbye_timeout{500};
  // A scatter: what the destination does not take in time goes to these, which `replicas` of them hold.
  std::vector<StageServer> servers;
  unsigned replicas = 1;
  bool direct = true;  // false: there is no destination, everything goes to the servers (start_round())
  // A server that does not acknowledge for so long is given up; a destination gets nothing more until it does.
  std::chrono::milliseconds stall_timeout{3000};
  bool release_as_evicted = false;  // after the switchover: memory is given back as others hold it
  // Which codec packs runs of pages, and what was agreed on with the destination and with all servers (wire::kEncodings).
  wire::Compress compress = wire::Compress::kOff;
  std::uint16_t destination_encodings = 0;
  std::uint16_t server_encodings = 0;
  std::uint64_t delta_cache_bytes = 0;  // 0: rounds send no deltas
  // How many pages of each region the destination was told of; empty: as many as there are, whenever it is.
  std::vector<std::uint64_t> told_pages;
  // How many pages of each region the destination has as a base (empty: none); such a region needs a tracker. And the
  // key of the hashes by which they are compared.
  std::vector<std::uint64_t> base_pages;
  KeyedHashKey base_key{};
  // Of a scatter: pages that the servers hold already for this domain go as references, after the switchover.
  std::optional<ContentKey> dedup;
  std::chrono::milliseconds directory_dial_timeout{1000};
  std::chrono::milliseconds directory_patience{1000};  // for all answers to what is asked at once
  // Without servers: the destination is of this domain too, and pages that it says it has go as references.
  std::optional<ContentKey> references;
  EngineCallback on_event;
};

// What an encoding has come to.
struct EncodingStats {
  std::uint64_t raw_bytes = 0;  // of the pages that went encoded
  std::uint64_t encoded_bytes = 0;
  std::uint64_t pages = 0;
  std::uint64_t cpu_ns = 0;  // what was tried for nothing included
};

struct SenderStats {
  std::uint64_t bytes_on_wire = 0;  // everything written to data and demand sockets, headers included
  std::uint64_t pages_sent = 0;     // with content, again counted each time
  std::uint64_t pages_zero = 0;     // sent as zero runs, never-touched ones included
  std::uint64_t pages_resent = 0;   // sends of a page that had been sent before (also as zero)
  std::uint64_t pages_pending = 0;
  // Where there is a base to compare with: those of them that are not known to be zeros.
  std::uint64_t pages_with_content = 0;
  std::uint64_t faults_served = 0;
  std::uint64_t redials = 0;
  std::uint64_t extra_memory_bytes = 0;  // peak of what the engine itself holds
  std::uint64_t pages_direct = 0;        // a scatter: acknowledged by the destination, the last time each
  std::uint64_t pages_single = 0;        // a scatter with two replicas: that one server alone keeps
  struct Server {
    std::uint64_t pages = 0;
    std::uint64_t bytes = 0;
    std::string failed;  // why it was given up, or empty
  };
  std::vector<Server> servers;
  EncodingStats compression;
  EncodingStats delta;
  BaseStats base;
  std::optional<DedupStats> dedup;  // where it was asked for
};

class Sender {
 public:
  explicit Sender(SenderConfig config);  // throws std::invalid_argument
  ~Sender();                             // close()
  Sender(const Sender&) = delete;
  Sender& operator=(const Sender&) = delete;

  void connect();

  // Marks every page pending: populated ones with content, never-touched ones as zero runs. The guest may run.
  void queue_populated();
  // Whoever is to hold a region that has grown has room for so many pages of it now: the next call marks them.
  void told_growth(std::uint32_t region, std::uint64_t pages);
  // tracker->collect() of every region (and pages gained by growth) into pending; gives how many pages are
  // pending now. With `paused` the caller says that the guest no longer writes.
  std::uint64_t queue_dirty();
  // Sends all that is pending, then a barrier on every channel. Where `references` is false, nothing goes as a reference:
  // one that comes to nothing costs a round trip at the end.
  void start_round(std::uint64_t tag, bool references = true);

  // Sends so many bytes that nobody needs, at most kMostProbeBytes, then a barrier: how fast is the link?
  static constexpr std::uint64_t kMostProbeBytes = 8 * 1024 * 1024;
  void probe(std::uint64_t tag, std::uint64_t bytes);
  // Compares at most `most_nodes` nodes with the destination's base; those that are equal are pending no more, but for
  // an estimate. The trackers are armed. The guest may run.
  void compare_base(std::uint64_t tag, std::uint64_t most_nodes, CompareDepth depth);
  // No more is compared. With `drop` the destination lets go at once of what was not confirmed.
  void end_base(std::uint64_t tag, bool drop);

  // Collects what is dirty, marks it pending and tells the destination to discard it, then a barrier:
  // kRoundDone{tag}. Gives the number of pages newly marked.
  std::uint64_t discard_dirty(std::uint64_t tag);
  // The guest is paused. The last discards (collects by itself), then kSwitch: kSwitched.
  // Gives the number of pages newly marked by the final scan.
  std::uint64_t switch_over();
  void start_push();
  // A scatter, before start_push(): kEvicted does not come, and no memory is given back, as long as it is held. For whoever
  // asks the servers to keep what they hold beyond their leases. What one holds that does not goes again to others.
  void hold_eviction(bool held);
  void give_up_server(std::size_t ordinal, std::string why);

  void set_bandwidth(std::uint64_t bytes_per_second);
  [[nodiscard]] SenderStats stats() const;
  // XXH3_128 over the page hashes of one region as its memory is now; the guest must be paused for good.
  // Runs on the caller's thread (bind/ calls it from a worker thread).
  [[nodiscard]] Hash128 digest(std::uint32_t region) const;
  // Ends every thread and socket. With `goodbye` the destination sees an end, not a cut. May be called twice.
  void close(bool goodbye);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace memferry
