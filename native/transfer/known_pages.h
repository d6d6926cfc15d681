// What this process has of one deduplication domain, by name: the host's page share, and pages that have arrived for
// guests which are being received. The sources of these guests are told the names (next_names()) and send references;
// resolve() finds the page again, copies it, and believes only the HMAC of its copy. So nothing here is ever
// invalidated: a page that its guest has written meanwhile, or that has left the share, is not there, and the source
// sends it.
//
// Pages that arrive are hashed beside their reception, by one thread that gives way to all others: what it cannot do in
// time is never known, and where arrivals are faster than it is, it rests.
//
// Threads: any; two of its own. Locks: Memory::reading before KnownPages::mutex_ before queue_mutex_.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "fault/arrival_map.h"
#include "os/worker_thread.h"
#include "page/content_hash.h"
#include "share/page_share.h"
#include "transfer/events.h"
#include "wire/frame.h"

namespace memferry {

class KnownPages : public std::enable_shared_from_this<KnownPages> {
 public:
  using Clock = std::chrono::steady_clock;
  // Of pages that wait to be hashed; when more arrive than that, the link is faster than the hash.
  static constexpr std::uint64_t kMostWaitingBytes = 16ULL << 20;
  static constexpr std::chrono::milliseconds kRest{250};  // then, until it is tried again
  // Pages of guests that are known at once, each some 60 bytes.
  static constexpr std::size_t kMostPlaces = std::size_t{1} << 20;

  // The one of this domain and share in this process. `share_path` empty: no share. Whoever holds it before guests come
  // spares these the wait for the share's index: they are told what it listed when it was read last, and then the rest.
  static std::shared_ptr<KnownPages> of_domain(const ContentKey& key, const std::string& share_path);
  ~KnownPages();
  KnownPages(const KnownPages&) = delete;
  KnownPages& operator=(const KnownPages&) = delete;

  class Guest;
  class Alone;
  // A guest begins to arrive. The regions of its maps stay mapped until its close() has returned.
  [[nodiscard]] std::unique_ptr<Guest> join(std::vector<ArrivalMap*> maps);

  // Until the share's index was read and nothing waits to be hashed; false when that took too long. For tests.
  bool wait_idle(std::chrono::milliseconds patience);
  // For tests: instead of kMostPlaces.
  void limit_places(std::size_t most);
  [[nodiscard]] std::uint64_t memory_bytes() const;

 private:
  using Names = std::shared_ptr<const std::vector<wire::KnownName>>;

  // Of one guest; outlives it in the hands of whoever still looks at it, and is closed then.
  struct Memory {
    explicit Memory(std::vector<ArrivalMap*> of) : maps(std::move(of)) {}
    const std::vector<ArrivalMap*> maps;
    std::shared_mutex reading;  // shared: who reads a page; alone: who discards pages, or ends it all
    // How many have it alone or want to: nobody begins to read. The lock by itself lets readers in for as long as there
    // are any.
    std::atomic<unsigned> barred{0};
    std::atomic<bool> closed{false};        // changed with both locks held
    std::atomic<bool> hushed{false};        // the hashing thread begins with no more pages
    std::atomic<std::uint64_t> in_hand{0};  // hand_of() the page that it reads, or 0
    // Guarded by KnownPages::mutex_:
    bool hashing = false;  // the hashing thread reads it
    bool wants_share = true;
    bool share_read_for = false;    // it was there when the reading began
    Names share_given;              // as they were when it came
    std::deque<Names> share_names;  // to be told
    std::size_t share_told = 0;     // of the first of these
    std::size_t told = 0;           // of names_
    [[nodiscard]] bool has(std::uint32_t region, PageNumber page) const;
    bool read(std::uint32_t region, PageNumber page, std::span<std::byte> into) const;
    bool copy(std::uint32_t region, PageNumber page, std::span<std::byte> into);
    // Of the hashing thread.
    bool read_in_hand(std::uint32_t region, PageNumber page, std::span<std::byte> into);
    [[nodiscard]] static std::uint64_t hand_of(std::uint32_t region, PageNumber page) {
      return (std::uint64_t{region} << kPageBits | page.value) + 1;
    }
    // While what it reads is such a page: waits(region, page).
    template <typename Waits>
    void wait_for_hand(Waits waits) const {
      for (std::uint64_t hand = in_hand; hand != 0; hand = in_hand) {
        const std::uint64_t of = hand - 1;
        if (!waits(static_cast<std::uint32_t>(of >> kPageBits),
                   PageNumber{of & ((std::uint64_t{1} << kPageBits) - 1)}))
          return;
        in_hand.wait(hand);
      }
    }
    static constexpr unsigned kPageBits = 40;
  };
  struct Place {
    std::weak_ptr<Memory> memory;
    std::uint32_t region = 0;
    PageNumber page{};
  };
  struct Waiting {
    std::shared_ptr<Memory> memory;
    RegionRun run;
  };
  using Found = std::pair<wire::KnownName, RegionRun>;

  KnownPages(const ContentKey& key, std::string share_path);
  void arrived(const std::shared_ptr<Memory>& memory, RegionRun run);
  std::vector<wire::KnownName> next_names(Memory& memory, std::size_t most);
  [[nodiscard]] bool awaits_share(const Memory& memory) const;
  [[nodiscard]] bool living_locked(wire::KnownName name) const;
  bool resolve(const ContentDigest& digest, std::span<std::byte> into);
  void leave(Memory& memory);
  void load_share();
  void hash_arrivals();
  void hash_run(const Waiting& waiting, std::vector<std::byte>& page);
  void publish_locked(const std::shared_ptr<Memory>& memory, std::span<const Found> found);
  void sweep_locked();
  [[nodiscard]] bool full_locked() const {
    return names_.size() >= most_places_ || places_.size() >= most_places_;
  }

  const ContentKey key_;
  const ContentHasher hasher_;
  const std::string share_path_;
  const bool reads_memory_;  // the kernel lets us copy our own memory without faults

  mutable std::mutex mutex_;  // guards the rest, and the marked fields of Memory
  std::condition_variable hash_wanted_;
  std::condition_variable share_wanted_;
  std::condition_variable idle_;
  std::shared_ptr<PageShareReader> share_;
  Names share_names_;     // what it listed when it was read last, best first
  bool loading_ = false;  // it is to be read
  bool reading_ = false;  // it is being read
  std::vector<std::weak_ptr<Memory>> memories_;
  std::size_t most_places_ = kMostPlaces;
  std::unordered_map<wire::KnownName, Place> places_;
  std::vector<wire::KnownName> names_;  // of places, in the order in which they became known
  std::atomic<bool> stopping_{false};   // changed with both

  // Held for moments only, since receiving threads take it: guards the five below.
  mutable std::mutex queue_mutex_;
  std::deque<Waiting> waiting_;
  std::uint64_t waiting_bytes_ = 0;
  bool hashing_ = false;  // one that waited is in the thread's hands
  Clock::time_point rest_until_{};
  bool full_ = false;  // no more places, until a guest leaves
  WorkerThread hasher_thread_;
  WorkerThread share_thread_;
};

// While it is held nobody reads a guest's pages for a reference.
class KnownPages::Alone {
 public:
  Alone() = default;
  explicit Alone(std::shared_ptr<Memory> memory) : memory_(std::move(memory)) {
    ++memory_->barred;
    memory_->reading.lock();
  }
  ~Alone() {
    if (!memory_) return;
    memory_->reading.unlock();
    --memory_->barred;
  }
  Alone(const Alone&) = delete;
  Alone& operator=(const Alone&) = delete;

 private:
  const std::shared_ptr<Memory> memory_;
};

// Of one receiver.
class KnownPages::Guest {
 public:
  Guest(std::shared_ptr<KnownPages> known, std::shared_ptr<Memory> memory)
      : known_(std::move(known)), memory_(std::move(memory)) {}
  ~Guest() { close(); }
  Guest(const Guest&) = delete;
  Guest& operator=(const Guest&) = delete;

  // Pages that came from its source, verified and in memory.
  void arrived(std::uint32_t region, PageRun run) { known_->arrived(memory_, {region, run}); }
  // Names that its source was not told, at most `most` of them.
  [[nodiscard]] std::vector<wire::KnownName> next_names(std::size_t most) {
    return known_->next_names(*memory_, most);
  }
  // The share's index is being read for it: names of that come soon.
  [[nodiscard]] bool awaits_share() const { return known_->awaits_share(*memory_); }
  // What is discarded now and missing after the switch would be waited for by whoever reads it.
  [[nodiscard]] Alone alone() { return Alone(memory_); }
  // From here to resume_hashing() no page of it is read to be hashed, but for one that was in hand: the discards before
  // a switch wait for that, if it is theirs. For others they do not, the thread being of low priority.
  void stop_hashing() { memory_->hushed = true; }
  void resume_hashing() { memory_->hushed = false; }
  void wait_for_hash(std::uint32_t region, PageRun run) const {
    memory_->wait_for_hand([&](std::uint32_t of, PageNumber page) {
      return of == region && page.value >= run.first.value && page.value - run.first.value < run.count;
    });
  }
  void wait_for_hash_of_missing() const {
    memory_->wait_for_hand([this](std::uint32_t region, PageNumber page) {
      return !memory_->maps[region]->received.test(page);
    });
  }
  // The page with this hash, from wherever it is known.
  bool resolve(const ContentDigest& digest, std::span<std::byte> into) {
    return known_->resolve(digest, into);
  }
  // Nobody reads its regions afterwards. What is missing must fail to be read by then, or be ordinary memory: the hashing
  // thread may be waiting for it.
  void close() { known_->leave(*memory_); }
  [[nodiscard]] std::uint64_t memory_bytes() const { return known_->memory_bytes(); }

 private:
  const std::shared_ptr<KnownPages> known_;
  const std::shared_ptr<Memory> memory_;
};

}  // namespace memferry
