// Deduplication at a source, beside the sending: one thread looks at pages ahead of the lanes, hashes them, asks the
// directory servers in batches, and hands what the servers hold already to their ways as references. It claims a page
// (takes its pending bit) only once it knows of a better way for it: a page that nobody has looked at when a lane has
// room goes plainly, so looking never holds one up.
//
// A claimed page is in one of two lists, and what cannot go on from there is pending again: `references_`, which the
// holder's way sends next, and `deferred_`, pages that somebody else (another guest's source, or this one with an
// equal page) is sending; while they are asked for once more they are in `asking_`. A round ends when all three are
// empty.
//
// In a round the guest writes. A page is copied first, and both of its hashes are of the copy. It may be referred to
// only in the round in which it was copied: its dirty bit was cleared before that round began, so what is written after
// the copy is reported and goes again, as behind a page that was sent.
//
//   begin(1)        copy P = A    [P is written: B]    lanes send P, the round ends
//   collect: P dirty              begin(2)
//   answer: A is held by S        P is pending, but not of round 1: not claimed (Test: dedup_rounds_test.cc)
//
//   scatter_dedup.cc     lists, what an acknowledgement means, figures
//   dedup_prober.cc      the thread: when to look, what to make of an answer
//   dedup_look.cc        which pages, and what is seen
//   dedup_directory.cc   its connections to the servers
//   scatter_refer.cc     a way that sends references
//
// Threads: mf-dedup; what is marked `locked` by any with Scatter::mutex_ held.
#pragma once

#include <deque>
#include <map>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "os/mapping.h"
#include "os/worker_thread.h"
#include "page/content_hash.h"
#include "stage/content_domain.h"
#include "transfer/dedup_pace.h"
#include "transfer/scatter_impl.h"

namespace memferry {

class Scatter::Dedup {
 public:
  // Pages that wait for somebody else's copy, and as many that wait for their way, at most: what goes beyond that
  // goes plainly.
  static constexpr std::size_t kMostDeferred = 65536;
  // Pages that a way sends references of in one go.
  static constexpr std::size_t kMostAtOnce = 512;
  // Runs that wait to be told of, at most: what goes beyond that is not known to others.
  static constexpr std::size_t kMostSettled = 65536;

  struct Page {
    std::uint32_t region = 0;
    PageNumber page{0};
    ContentDigest hash{};
    std::uint64_t xxh3 = 0;
  };
  struct Reference {
    Page page;
    wire::Holders holders;
    Clock::time_point since{};
  };

  Dedup(Scatter& scatter, const ContentKey& key);
  ~Dedup() { stop(); }
  Dedup(const Dedup&) = delete;
  Dedup& operator=(const Dedup&) = delete;

  void start();
  void shut_down_locked();
  void stop();

  // A round or the push begins: what is pending now was written since it was looked at.
  void begin_locked(Kind kind, bool references);
  // Nothing is claimed.
  [[nodiscard]] bool idle_locked() const {
    return reference_count_ == 0 && deferred_.empty() && asked_again_ == 0;
  }
  [[nodiscard]] bool any_references_locked(int server) const {
    return !references_[static_cast<std::size_t>(server)].empty();
  }
  // Of the server's next references; there is one.
  [[nodiscard]] wire::Holders next_holders_locked(int server) const {
    return references_[static_cast<std::size_t>(server)].front().holders;
  }
  // As many of the next ones as have these holders, but for what is safe by now: looks, and drop() takes them.
  void look_locked(int server, wire::Holders holders, std::vector<Reference>& into, std::size_t& seen) const;
  void drop_locked(int server, std::size_t seen);
  // The server's references go plainly.
  void give_back_locked(int server);
  // Those that have waited for longer than `patience` do.
  void give_back_late_locked(Clock::time_point now, Clock::duration patience);
  // Pages that were acknowledged, and are safe for the first time.
  // `references`: that was what it took.
  void settled_locked(std::uint32_t region, PageRun run, wire::Holders holders, bool references);
  // Nothing else is left to send: what waits for somebody else waits no longer than it has paid for.
  void give_up_waiting_locked(Clock::time_point now);
  // It is pending again, whatever way it went.
  void put_back_locked(std::uint32_t region, PageNumber page);
  // Nothing is asked there any more, and no reference counts on it as either holder.
  void server_failed_locked(std::uint8_t server);
  // A server does not hold what was referred to.
  void refused_locked(std::uint32_t region, PageRun run);
  // Of pages as they lie in memory, however they were packed: that is what hashing is compared with.
  void acknowledged(std::uint64_t raw_bytes, std::uint64_t wire_bytes) {
    acknowledged_bytes_.fetch_add(raw_bytes, std::memory_order_relaxed);
    acknowledged_wire_bytes_.fetch_add(wire_bytes, std::memory_order_relaxed);
  }
  void count_overhead(std::uint64_t bytes) { overhead_bytes_.fetch_add(bytes, std::memory_order_relaxed); }

  [[nodiscard]] DedupStats stats() const;
  [[nodiscard]] std::uint64_t memory_bytes() const;

 private:
  struct Region {
    explicit Region(std::uint64_t pages);
    // Of pages in `named`; not touched before. Both of the same bytes.
    const std::unique_ptr<wire::ContentName[]> names;
    const std::unique_ptr<std::uint64_t[]> seen;  // XXH3
    AtomicBitmap examined;  // looked at: once a round, so that a page is put off once at most
    AtomicBitmap named;
    AtomicBitmap to_tell;   // to be told of when it is safe
    AtomicBitmap told;      // its holders know it by its name
    AtomicBitmap referred;  // went as a reference, and is not acknowledged
  };
  using Place = std::pair<std::uint32_t, PageNumber>;  // region, page
  struct Deferred {
    Page page;
    std::optional<Place> twin;  // our own equal page; else another source's
    Clock::time_point next{};
    unsigned tries = 0;
    bool second_twin = false;  // the first one was slow, or of no use
    bool claimed = false;      // while it is in asking_
    bool given_up = false;     // likewise: it goes plainly, whatever the answer is
  };
  struct Settled {
    std::uint32_t region = 0;
    PageRun run;
    wire::Holders holders;
  };
  struct Directory {
    std::shared_ptr<wire::Stream>
        stream;  // guarded by Scatter::mutex_ where it is set; then the thread's own
    std::uint32_t attempt = 0;
  };

  // dedup_prober.cc
  void run(WorkerThread& self);
  void run_until_closed(WorkerThread& self);
  bool step();
  void measure(Clock::time_point now);
  bool examine(Clock::time_point now);
  bool retry(Clock::time_point now);
  [[nodiscard]] Clock::duration rest_locked() const;
  // The first of deferred_: leaves it, or goes to its end. `leads`: see there.
  void look_again_locked(Clock::time_point now, bool dry, std::map<Place, Place>& leads);
  void note_look_locked(Deferred& look, Clock::time_point now);
  enum class Twin { kWaits, kReferred, kNoUse };
  [[nodiscard]] Twin look_at_twin_locked(const Deferred& page);
  void put_off_locked(const Deferred& page);
  void take_off_locked();  // the first one
  void ask_locked(const Deferred& page, bool claimed);
  void ask(std::uint64_t round);
  // What the answer means for a page.
  void settle_answer_locked(Deferred& page, wire::KnownHolders known);
  [[nodiscard]] std::optional<wire::Holders> usable_locked(wire::KnownHolders known) const;
  bool claim_locked(const Page& page, bool owned);
  // False: a lane has it, or nothing more fits into the list. An owned page is its owner's until then.
  bool refer_locked(const Page& page, wire::Holders holders, bool owned);
  void given_back_locked(const Reference& reference, std::vector<RegionRun>& into);
  void give_up_locked(const Page& page, bool owned);

  // dedup_look.cc
  [[nodiscard]] std::uint64_t unsent_pages() const;
  void pick(std::uint64_t most);
  [[nodiscard]] bool next_page();
  [[nodiscard]] bool look_at(Page& page, std::span<const std::byte> bytes);
  // The first page of this guest that had the same name, or nullopt: it is that itself from now on.
  std::optional<Place> twin_of(const Page& page);
  // From now on another one is.
  void replace_twin(const Page& with, const Place& before);

  // dedup_directory.cc
  void dial();
  [[nodiscard]] std::vector<Settled> still_known(std::span<const Settled> settled) const;
  bool tell();
  // Of names_to_ask_, in order.
  void probe(std::vector<wire::KnownHolders>& answers);
  bool send(std::size_t server, std::vector<std::byte>& bytes, Clock::time_point deadline);
  bool receive(std::size_t server, wire::FrameType type, std::uint64_t tag, std::span<std::byte> payload,
               Clock::time_point deadline);
  void lose_directory(std::size_t server);

  Scatter& scatter_;
  const ContentHasher hasher_;
  std::vector<std::unique_ptr<Region>> regions_;
  WorkerThread thread_;

  // Guarded by Scatter::mutex_:
  std::vector<std::deque<Reference>> references_;  // by server
  std::size_t reference_count_ = 0;                // of all
  std::vector<Settled> settled_;
  std::deque<Deferred> deferred_;
  std::size_t deferred_twins_ = 0;               // of these
  std::vector<Deferred> asking_;                 // only the thread adds and removes any
  std::size_t asked_again_ = 0;                  // of these: claimed, and not given up
  std::uint64_t round_ = 0;                      // how many have begun
  bool looks_ = true;                            // in this one
  std::uint64_t pages_before_ = 0;               // pages_ when this one did
  DedupWaiting waiting_;                         // in this one
  std::optional<double> link_bytes_per_second_;  // measured_'s
  double wire_bytes_per_second_ = 0;

  // The thread's own:
  std::vector<Directory> directories_;
  std::vector<std::uint64_t> identities_;  // 0 where there is no connection
  std::vector<Deferred> batch_;
  std::vector<std::byte> copy_;                  // of the page that is looked at
  std::vector<wire::ContentName> names_to_ask_;  // asking_'s
  std::vector<wire::KnownHolders> answers_;
  std::uint64_t next_tag_ = 1;
  std::uint32_t at_region_ = 0;
  RegionReader reader_;
  PageNumber at_page_{0};
  std::uint64_t placed_in_ = 0;  // the round
  Mapping twins_;
  std::uint64_t twin_mask_ = 0;
  DedupMeasured measured_;
  std::optional<Clock::time_point> measured_at_;  // the link was busy then
  std::uint64_t measured_bytes_ = 0;
  Clock::duration busy_time_{};
  std::uint64_t busy_bytes_ = 0;
  std::uint64_t measured_wire_bytes_ = 0;
  std::uint64_t busy_wire_bytes_ = 0;
  Clock::time_point looked_at_ = Clock::now();
  Clock::time_point next_sample_{};
  Clock::time_point next_retry_{};

  std::atomic<std::uint64_t> acknowledged_bytes_{0};
  std::atomic<std::uint64_t> acknowledged_wire_bytes_{0};
  std::atomic<std::uint64_t> overhead_bytes_{0};
  std::atomic<std::uint64_t> pages_{0};
  std::atomic<std::uint64_t> refused_{0};
  std::atomic<std::uint64_t> examined_{0};
  std::atomic<std::uint64_t> probes_{0};
  std::atomic<std::uint64_t> hash_ns_{0};
  std::atomic<std::uint64_t> told_{0};
};

}  // namespace memferry
