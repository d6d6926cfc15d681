// The source's side of a scatter: every way out (the data connections, the demand connection, one connection a
// server) takes chunks from the one queue as it has room, and what is not acknowledged in time goes out again by
// another. docs/protocol.md, "The VMD", has the sequence.
//
//   open() at connect            servers are dialled, each by its own thread
//   begin(round or push)         from now on the ways take what is pending
//   -> drained                   round: everything acknowledged by somebody, and told to all
//                                push: the same, and so for good: eviction
//
// The direct connection comes first: a server takes a chunk only while the direct ways are full, gone or stalled.
//
// A server has *failed* for this migration when it is cut and cannot be dialled again, has lost the image, or does
// not acknowledge for stall_timeout: what only it holds is pending again, and it gets nothing more.
//
// With two replicas a page goes to a server only together with a second one. While all others are merely being dialled
// again a server gets nothing: each of them is there soon, or fails. What is left with one copy by a failure goes out
// again (in rounds, in the next one). Where fewer than two servers have room, the destination takes what is left, and a
// park fails. One copy is enough only where fewer than two servers live, or where the destination takes nothing either.
// What went out again for a second one is as safe as before then, and where a park finds no room for it.
//
// Threads: one a server (mf-scatter-N, with a reader each), the data channels' own, and one that looks after
// deadlines (mf-evict). `mutex_` guards the ways; it is not held over a socket call, and the demand server takes it
// only after it has answered. Lock order: Sender's mutex, then this one.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "fault/discard.h"
#include "os/worker_thread.h"
#include "page/content_hash.h"
#include "transfer/chunk_gatherer.h"
#include "transfer/dedup_stats.h"
#include "transfer/lane.h"
#include "transfer/stage_server_address.h"
#include "transfer/touch_gate.h"
#include "transfer/whereabouts.h"
#include "wire/pacer.h"
#include "wire/socket.h"
#include "wire/stream.h"

namespace memferry {

struct ScatterConfig {
  std::vector<StageServer> servers;
  unsigned replicas = 1;  // 1 or 2: on how many servers a scattered page is kept
  std::chrono::milliseconds connect_timeout{5000};
  std::chrono::milliseconds stall_timeout{3000};
  std::chrono::milliseconds answer_timeout{30000};  // of the destination, in a round
  bool release_as_evicted = false;
  bool direct = true;  // false: there is no destination yet (park)
  Encoding encoding;
  // Of the guest's deduplication domain; none: every page is sent.
  std::optional<ContentKey> dedup;
  // For a connection to a directory; and for all answers to what is asked at once, sending included, however the bytes
  // of them trickle in. Pages that are put off wait for it. When one has used it up, only what is here already is taken
  // from the others.
  std::chrono::milliseconds directory_dial_timeout{1000};
  std::chrono::milliseconds directory_patience{1000};
};

class Scatter {
 public:
  using Clock = std::chrono::steady_clock;
  // The first of the list hold the whole map.
  static constexpr unsigned kIndexServers = 4;
  // When nothing is left to take, what somebody has not acknowledged for this long goes to whoever is idle.
  static constexpr std::chrono::milliseconds kTailPatience{80};

  // What it shares with the sender it belongs to; all of it outlives it.
  struct Shared {
    const wire::MigrationId migration;
    SendQueue& queue;
    TouchGate& gate;
    wire::Pacer& pacer;  // of the direct ways; its limit is for all of them
    const int cancel_fd;
    std::function<void(const PageFrames::Sent&)> count_sent;
    std::function<void(std::uint64_t)> count_bytes;
    std::function<void()> drained;  // once a begin(); from any thread, no lock held
    // This side cannot go on. No lock held.
    std::function<void(std::string code, std::string why)> broken;
  };

  Scatter(ScatterConfig config, Shared shared, std::uint64_t page_size);
  ~Scatter();  // close()
  Scatter(const Scatter&) = delete;
  Scatter& operator=(const Scatter&) = delete;

  // Dials all servers; returns when each is connected or has failed. Gives why none could be reached, or nothing.
  std::string open();

  // The destination has these pages already, as they are here; their hashes.
  void note_same(std::uint32_t region, PageRun run, std::span<const std::uint64_t> xxh3);

  enum class Kind { kRound, kPush };
  // What is pending now goes out. In a round the guest runs here: `sinks` see what leaves.
  // `references`: whether pages may go as such.
  void begin(Kind kind, std::vector<PageFrames::OnHash> sinks, bool references);

  // While it is held a push is not drained, nor is memory given back: whether the servers keep what they hold is not known.
  void hold(bool held);
  // It does not keep what it holds, whatever it acknowledges: given up, as if it had failed.
  void give_up(std::size_t ordinal, std::string why);

  // What is pending has been written since it was acknowledged. Before anything may be taken out of turn: a fault's
  // answer takes its page before the push begins.
  void forget_pending();

  // A way to the destination. Its owner calls run() on the sending thread: true when drained, false when the
  // connection is over or `over` says so.
  class Way;
  std::shared_ptr<Way> open_direct(unsigned index, std::shared_ptr<wire::Stream> stream, std::string name);
  std::shared_ptr<Way> open_demand();
  bool run_direct(Way& way, const std::function<bool()>& over, std::string& cut);
  // The connection is gone: what it had not acknowledged is pending again.
  void close_direct(Way& way);
  // Empty, or what the peer did wrong.
  std::string acknowledged(Way& way, std::uint64_t tag);
  void suspect(std::uint32_t region, PageRun run);
  // After a round: pages that somebody could not verify; they are pending again.
  std::uint64_t take_suspects();
  // The demand server is about to answer a fault with these: from here on they are somewhere, sent or not.
  void answering(Way& way, const RegionRun& run, std::uint64_t bytes);
  // It has. True: enough for a barrier.
  bool answered(Way& way);
  // The tag of the barrier to send behind all answers since the last one; nullopt: there was none.
  std::optional<std::uint64_t> close_answers(Way& way);
  [[nodiscard]] bool answers_open(const Way& way) const;
  // For a fault's page: nullptr, or it has been released here and this says where it is.
  bool released(std::uint32_t region, PageNumber page, wire::Holders& holders) const;
  std::mutex& release_mutex() { return release_mutex_; }
  void never_release(std::uint32_t region, PageNumber page);
  [[nodiscard]] const PageFrames::OnHash& hash_sink(std::uint32_t region) const {
    return note_sinks_[region];
  }

  // After a redial: the destination says what it has.
  void reconcile(std::uint32_t region, const AtomicBitmap& have);

  struct ServerStats {
    std::uint64_t pages = 0;
    std::uint64_t bytes = 0;  // on the wire to it
    std::string failed;       // why, or empty
  };
  [[nodiscard]] std::vector<ServerStats> server_stats() const;
  [[nodiscard]] std::optional<DedupStats> dedup_stats() const;
  // The push needs no destination: servers take pages, and one that others can ask where they are lives.
  [[nodiscard]] bool goes_on_alone() const;
  [[nodiscard]] std::uint64_t pages_direct() const;
  // With two replicas: pages that one server alone keeps.
  [[nodiscard]] std::uint64_t pages_single() const;
  [[nodiscard]] const Whereabouts& whereabouts() const { return where_; }
  // A fault is being answered, was answered: all ways leave it room on this host's link.
  void fault_begin() { link_pacer_.fault_begin(); }
  void fault_end(std::uint64_t bytes) { link_pacer_.fault_end(bytes); }
  void wake();  // whoever waits looks again: `over` has changed
  [[nodiscard]] std::uint64_t memory_bytes() const;

  void shut_down();  // wakes and ends everything; does not wait
  void close();

 private:
  struct Server;
  class Dedup;
  [[nodiscard]] bool wants_work(const Way& way) const;
  [[nodiscard]] bool may_take(const Way& way) const;
  [[nodiscard]] bool takes_more(const Way& way) const;
  [[nodiscard]] bool full(const Way& way) const;
  [[nodiscard]] bool direct_is_full() const;
  [[nodiscard]] bool drained_locked() const;
  [[nodiscard]] bool index_lives_locked() const;
  [[nodiscard]] bool destination_knows_locked() const;
  // nullopt: a second one is to hold it, and may be there again soon, or somebody else takes it.
  [[nodiscard]] std::optional<wire::Holders> holders_for(const Way& way) const;
  [[nodiscard]] bool second_copies_locked() const;
  [[nodiscard]] bool destination_takes_locked() const;
  [[nodiscard]] bool encodes() const;  // what goes to servers, or some of it
  void want_second_locked(const std::vector<RegionRun>& single, std::vector<RegionRun>& again);
  void queue_seconds_locked();
  void look_at_copies_locked();
  void check_drained();
  std::uint64_t queue_suspects_locked();
  bool run(Way& way, const std::function<bool()>& over, std::string& cut);
  bool send_records(Way& way, std::vector<std::byte>& buffer, std::string& cut);
  bool send_chunk(Way& way, ChunkGatherer& chunks, std::string& cut);
  bool send_barrier(Way& way, bool now, std::string& cut);
  bool send_chains_over(Way& way, std::string& cut);
  [[nodiscard]] bool may_refer(const Way& way) const;  // scatter_refer.cc
  bool send_references(Way& way, std::string& cut);
  void settle_locked(const Lane::Batch& batch, std::vector<RegionRun>& again);
  void looked_locked(bool more, bool gave_back, std::uint64_t returns_before);
  [[nodiscard]] std::optional<Clock::time_point> waits_since(const Way& way) const;
  [[nodiscard]] bool tail_is_late(const Way& way, Clock::time_point now) const;
  void put_back_locked(const std::vector<RegionRun>& runs);
  void watch(WorkerThread& self);
  void watch_until_stopped(WorkerThread& self);
  void release_settled();

  // scatter_server.cc
  void serve(Server& server);
  void serve_until_failed(Server& server);
  void read(Server& server, const std::shared_ptr<Way>& way);
  std::string read_answers(Server& server, const std::shared_ptr<Way>& way);
  void attach_pacer_locked();
  void fail_server_locked(Server& server, std::string why);
  [[nodiscard]] std::vector<RegionRun> take_back_locked(Way& way);

  const ScatterConfig config_;
  const Shared shared_;
  const std::uint64_t page_size_;
  // Of the source's own link, which all ways share; the direct ones are paced for their own way as well.
  // Larger pieces than theirs: one server has one thread, which has to keep the link full.
  wire::Pacer link_pacer_{2 * wire::Pacer::kChunkOnLink};
  Whereabouts where_;
  std::vector<PageFrames::OnHash> note_sinks_;  // hashes into where_
  std::vector<std::unique_ptr<AtomicBitmap>> suspects_;
  std::vector<std::unique_ptr<AtomicBitmap>> for_second_;  // safe at one server: again in the next round
  std::vector<std::unique_ptr<AtomicBitmap>> released_;
  std::vector<std::unique_ptr<AtomicBitmap>>
      sent_twice_;  // perhaps still being read somewhere: not released early
  std::vector<std::unique_ptr<Discarder>> discarders_;  // the watcher's, one a region
  std::mutex release_mutex_;  // held while pages are given back, and by the demand server while it reads one

  mutable std::mutex mutex_;  // guards everything below
  std::condition_variable changed_;
  Kind kind_ = Kind::kRound;
  bool begun_ = false;        // between begin() and drained
  bool held_ = false;         // see hold()
  bool drained_due_ = false;  // the watcher has to say so
  // See above; look_at_copies_locked() keeps them. Of a page that goes out; and of one that had two.
  bool one_copy_does_ = true;
  bool first_copy_counts_ = true;
  Clock::time_point destination_left_ = Clock::now();  // while no way to it is open
  // Connections to it, all ways together, that ended one after the other without anything acknowledged.
  unsigned destination_barren_ = 0;
  static constexpr unsigned kMostBarren = 3;
  bool dry_ = false;  // nothing was pending when somebody looked last
  Clock::time_point dry_since_{};
  std::uint64_t returns_ = 0;
  bool closing_ = false;
  std::shared_ptr<const std::vector<PageFrames::OnHash>> sinks_;
  std::vector<std::shared_ptr<Way>> direct_;  // data ways; open
  std::shared_ptr<Way> demand_;
  std::vector<std::unique_ptr<Server>> servers_;
  // Of a server's connections that have ended, the last one's epoch: what it had not acknowledged may still be passed on
  // to a replica, and others are told to take nothing of it (kChainOver) before they are sent what may be newer.
  std::map<std::uint8_t, std::uint32_t> chains_over_;
  std::vector<RegionRun> to_release_;
  WorkerThread watcher_;
  std::unique_ptr<Dedup> dedup_;  // or nullptr, for good
};

}  // namespace memferry
