// The inside of Receiver, shared by its parts: receiver.cc (life, owner's calls), receiver_channels.cc (who is
// connected; cuts and recovery), receiver_silence.cc (a source that is connected and does not answer),
// receiver_frames.cc (what a connection says), receiver_base.cc (comparing with a base),
// receiver_known.cc (references to what is here already).
//
// Threads: one for each channel (the demand channel's is the last), one supervisor (events, deadlines,
// completion, poisoning), the pager's, and one that touches memory ahead. Locks: Impl::mutex before the
// pager's; no lock is held while a callback runs or a socket blocks.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "fault/arrival_map.h"
#include "fault/discard.h"
#include "fault/pager.h"
#include "os/worker_thread.h"
#include "transfer/fill.h"
#include "transfer/gather.h"
#include "transfer/hash_tree.h"
#include "transfer/receiver.h"
#include "transfer/touch_ahead.h"
#include "wire/bandwidth_cap.h"
#include "wire/stream.h"

namespace memferry {

// How a connection ended.
struct ChannelEnd {
  enum class Kind {
    kGoodbye,   // on purpose
    kCut,       // lost
    kBadFrame,  // the peer wrote what it must not write
    kFatal,     // this host cannot go on
  };
  Kind kind = Kind::kCut;
  std::string code;
  std::string message;
};

// The bytes of one connection as they are read: small frames of the demand channel come header and payload in
// one system call, large payloads go straight to where they belong.
class FrameReader {
 public:
  FrameReader(wire::Stream& stream, std::size_t buffer_bytes, std::atomic<std::uint64_t>& received)
      : stream_(stream), buffer_(buffer_bytes), received_(received) {}
  wire::IoResult read(std::span<std::byte> into);
  [[nodiscard]] std::uint64_t bytes() const { return bytes_; }

 private:
  wire::Stream& stream_;
  std::uint64_t bytes_ = 0;  // that have been read
  std::vector<std::byte> buffer_;
  std::size_t begin_ = 0;
  std::size_t end_ = 0;
  std::atomic<std::uint64_t>& received_;
};

// A channel's hold on the memory that it receives into: nobody else writes there at the same time, and the
// switch to paging sees that it is in use.
class FillingHold {
 public:
  FillingHold(std::atomic<unsigned>& frames, ArrivalMap& map, PageRun run)
      : frames_(frames), map_(map), run_(run) {
    frames_.fetch_add(1);
  }
  FillingHold(const FillingHold&) = delete;
  FillingHold& operator=(const FillingHold&) = delete;
  ~FillingHold() {
    if (taken_) map_.arriving.clear_run(run_);
    frames_.fetch_sub(1);
  }
  // When false, some of the bits stay set for good: the migration is over anyway.
  bool take() { return taken_ = map_.arriving.set_run(run_) == run_.count; }

 private:
  std::atomic<unsigned>& frames_;
  ArrivalMap& map_;
  const PageRun run_;
  bool taken_ = false;
};

struct Receiver::Impl {
  using Clock = std::chrono::steady_clock;
  enum class State { kFilling, kSwitching, kPaging, kComplete, kLost, kFailed };

  // A frame that is well-formed and still wrong, this often, and the source is given up.
  static constexpr unsigned kBadFramesForgiven = 3;
  static constexpr std::size_t kMostLostRuns = 1 << 20;
  // How often it is looked at where missing pages could come from, while there are servers.
  static constexpr std::chrono::milliseconds kGatherLook{100};
  static constexpr int kGatherRest = 20;  // times what the last look took

  struct Channel {
    unsigned index = 0;
    bool demand = false;
    // Guarded by Impl::mutex:
    std::shared_ptr<wire::Stream> next;     // attached, not yet taken by the thread
    std::shared_ptr<wire::Stream> current;  // served by the thread
    std::uint32_t epoch = 0;                // of the newest of the two
    std::uint32_t next_epoch = 0;           // tokens of those before it are used up
    bool attached = false;                  // in the current epoch, and not ended
    bool goodbye = false;
    // The thread's own:
    std::unique_ptr<Filler> filler;
    std::vector<std::byte> staging;
    std::vector<std::byte> decoded;
    wire::RunDecoder decoder;
    std::vector<std::uint64_t> hashes;
    WorkerThread thread;
  };

  explicit Impl(ReceiverConfig config_in);
  ~Impl();
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  // receiver.cc
  void start();
  void close();
  void take_remote(Region& region, std::size_t index);
  bool deliver();
  std::string undelivered;
  void region_gone();
  void supervise();
  void rest_here_locked();
  void complete_locked(std::unique_lock<std::mutex>& lock);
  void give_up_source_locked(Clock::time_point now);
  void poison_locked(std::unique_lock<std::mutex>& lock);
  void push(EngineEvent event);  // with the mutex held
  void fail(std::string code, std::string message);
  void fail_locked(std::string code, std::string message);
  void lose_locked(std::string code, std::string message);
  void check_complete();
  [[nodiscard]] std::vector<RegionRun> missing_runs(std::size_t max_runs) const;
  [[nodiscard]] std::vector<RegionRun> with_huge_pages(const std::vector<RegionRun>& runs) const;
  [[nodiscard]] std::uint64_t suspects() const;
  [[nodiscard]] bool filled() const;  // nothing in flight, nothing suspect, nothing missing

  // receiver_gather.cc
  void make_gather();
  Pager::Route route(const Pager::Asked& asked);
  bool storing(std::unique_lock<std::mutex>& filling);
  void fill_gathered(std::uint32_t region, PageRun run, std::span<const std::byte> bytes,
                     std::span<const std::uint64_t> hashes);
  void gathered(std::uint32_t region, PageRun run, std::span<const std::byte> bytes,
                std::span<const std::uint64_t> hashes);
  void from_base(std::uint32_t region, PageRun run, std::span<const std::byte> bytes,
                 std::span<const std::uint64_t> hashes);
  void install_current(std::uint32_t region, PageRun run, std::span<const std::byte> bytes,
                       std::span<const std::uint64_t> hashes,
                       const std::function<void(std::uint64_t)>& count);
  void gathered_zeros(std::uint32_t region, PageRun run);
  void check_filled();
  void look_after_gather_locked(std::unique_lock<std::mutex>& lock);
  void settle_lost_locked(std::unique_lock<std::mutex>& lock, const std::vector<RegionRun>& hopeless,
                          const std::vector<std::string>& names);

  // receiver_channels.cc
  bool attach(const wire::Hello& hello, UniqueFd& fd);
  void channel_main(Channel& channel);
  void ended(Channel& channel, std::uint32_t ended_epoch, const ChannelEnd& end);
  void cut_locked(const ChannelEnd& end);
  void shut_down_all_locked();
  bool demand_begins(Channel& channel, const std::shared_ptr<wire::Stream>& stream, std::uint32_t its_epoch);
  void demand_ends();
  [[nodiscard]] bool all_attached_locked() const;

  // receiver_silence.cc
  Clock::time_point look_after_source_locked(Clock::time_point now);
  [[nodiscard]] Clock::duration silence_locked() const;
  [[nodiscard]] std::optional<RegionRun> wanted_of_source_locked() const;

  // receiver_frames.cc
  ChannelEnd serve(Channel& channel, wire::Stream& stream);
  ChannelEnd serve_frames(Channel& channel, wire::Stream& stream);
  bool send_bitmaps(wire::Stream& stream);
  // Each gives false with `end` filled in when the connection is over.
  struct Conversation;
  bool on_pages(Conversation& with, const wire::FrameHeader& header);
  bool decode_staged(Conversation& with, const wire::FrameHeader& header, std::span<std::byte>& payload);
  bool fill_pages(Conversation& with, const wire::FrameHeader& header, ArrivalMap& map, FillingHold& hold);
  bool on_zeros(Conversation& with, const wire::FrameHeader& header);
  bool on_discard(Conversation& with, const wire::FrameHeader& header);
  bool on_switch(Conversation& with, const wire::FrameHeader& header);
  bool on_barrier(Conversation& with, const wire::FrameHeader& header);
  bool tell_taken(Conversation& with);
  void forget_locations(std::uint32_t region, PageRun run);
  bool on_map(Conversation& with, const wire::FrameHeader& header);
  bool on_elsewhere(Conversation& with, const wire::FrameHeader& header);

  // receiver_base.cc
  [[nodiscard]] ReceiverConfig::Base base_of(std::size_t region) const {
    return region < config.bases.size() ? config.bases[region] : ReceiverConfig::Base::kNone;
  }
  void take_bases();
  bool may_compare(Conversation& with);
  [[nodiscard]] bool in_sample(std::uint32_t region, std::uint64_t node) const;
  bool on_tree_request(Conversation& with, const wire::FrameHeader& header);
  bool send_hashes(Conversation& with, const wire::FrameHeader& request, NodeRun nodes, std::uint64_t cpu_us);
  bool on_same(Conversation& with, const wire::FrameHeader& header);
  bool on_base_end(Conversation& with, const wire::FrameHeader& header);
  bool on_probe(Conversation& with, const wire::FrameHeader& header);
  bool name_suspects(Conversation& with, std::uint32_t region, std::uint64_t tag, std::uint64_t& named);
  void account(std::uint64_t settled_pages);

  // receiver_known.cc
  bool on_reference(Conversation& with, const wire::FrameHeader& header);
  bool fill_known(Conversation& with, std::uint32_t region, PageRun run, std::span<const std::byte> pages);
  void install_known(Conversation& with, std::uint32_t region, PageRun run, std::span<const std::byte> pages);
  void refuse(std::uint32_t region, PageRun run);
  bool tell_refused(Conversation& with, std::uint32_t region, PageRun run,
                    std::span<const wire::ContentHash> hashes);
  void begin_telling(Conversation& with);
  bool tell_known(Conversation& with);
  [[nodiscard]] KnownPages::Alone unread() { return known ? known->alone() : KnownPages::Alone(); }

  std::shared_ptr<KnownPages> domain;  // taken out of the config; let go of by close()
  const ReceiverConfig config;
  std::vector<std::unique_ptr<Region::User>> users;
  std::vector<std::unique_ptr<RegionArrival>> arrivals;  // until close(): nobody samples what is not all here
  std::vector<std::unique_ptr<ArrivalMap>> maps;
  std::vector<Backing> backings;
  std::unique_ptr<Pager> pager;  // when it may page
  std::unique_ptr<TouchAhead> ahead;
  std::uint64_t page_size = 0;

  std::atomic<State> state{State::kFilling};  // changed with the mutex held, read without
  std::atomic<bool> switched{false};          // likewise
  // Frames that are being received straight into memory: none may be while the state changes to paging.
  std::atomic<unsigned> filling_frames{0};
  // Paging: pages that are there, their installation finished.
  std::atomic<std::uint64_t> settled{0};
  std::unique_ptr<Gather> gather;         // when there are servers
  std::unique_ptr<Filler> gather_filler;  // under gather->filling()
  wire::BandwidthCap intake;
  std::atomic<std::uint64_t> pages_gathered{0};
  std::atomic<std::uint64_t> pages_lost{0};
  std::atomic<bool> filled_wanted{false};
  std::atomic<bool> rounds_over{false};
  std::atomic<Clock::rep> rests_until{0};  // the source does, since the clock's epoch
  std::atomic<bool> source_sends{true};
  std::atomic<bool> sealing{false};  // kComplete may be taken back
  // kComplete, and seal() is still installing what waits for attached memory, without the mutex: the pager is its
  // alone, and the migration can still fail. Changed with the mutex held.
  std::atomic<bool> delivering{false};
  std::atomic<std::uint64_t> bytes_received{0};
  std::atomic<std::uint64_t> pages_received{0};
  std::atomic<std::uint64_t> pages_zero{0};

  // A base. The trees are channel 0's alone.
  std::vector<std::unique_ptr<HashTree>> trees;  // one a region; nullptr: no base, or no more is compared
  // The owner puts bases into the regions: no page may come before it says that it is done.
  std::atomic<bool> base_awaited{false};
  // A sample of it may be compared before that, or where it is still to be changed, asked about.
  enum class Sampled : std::uint8_t { kNo, kChanges, kStays };
  std::atomic<Sampled> base_sampled{Sampled::kNo};
  static constexpr std::uint64_t kMostSampled = 16;  // nodes, as protocol/base-sample.ts has it
  std::uint64_t most_asked_about = kMostSampled;     // of nodes, still
  std::atomic<std::uint64_t> pages_from_base{0};
  std::atomic<std::uint64_t> base_hash_us{0};
  std::atomic<std::uint64_t> tree_bytes{0};

  std::unique_ptr<KnownPages::Guest> known;  // where references were agreed on
  std::atomic<std::uint64_t> pages_known{0};
  std::atomic<std::uint64_t> pages_unresolved{0};

  mutable std::mutex mutex;  // guards everything below, and the marked fields of Channel
  std::condition_variable changed;
  std::deque<EngineEvent> events;  // a few in a lifetime: states, never pages
  std::uint32_t epoch = 0;
  bool epoch_cut = false;      // no more connections of this epoch
  unsigned barren_epochs = 0;  // one after the other, in which no page came
  std::uint64_t came_before_cut = 0;
  bool first_channel = false;
  bool source_left = false;                                     // it said goodbye: nothing more comes from it
  Clock::time_point source_gone_at = Clock::time_point::max();  // cut or left
  Clock::time_point no_source_since = Clock::time_point::max();  // given up, or left
  Clock::time_point map_asked_at{};
  Clock::time_point gather_look_at{};
  std::optional<RegionRun> uncovered;  // as of that look: a missing page that no server is known to have
  std::vector<std::string> lost_names;
  bool paused = false;
  bool demand_attached = false;
  unsigned bad_frames = 0;
  bool complete_due = false;
  bool lost_due = false;
  std::string lost_code;
  std::string lost_message;
  Clock::time_point recover_by = Clock::time_point::max();
  Clock::time_point poison_at = Clock::time_point::max();
  std::atomic<bool> closing{false};  // changed with the mutex held, read without
  bool closed = false;
  std::vector<std::unique_ptr<Channel>> channels;
  WorkerThread supervisor;
};

// One connection while it is served.
struct Receiver::Impl::Conversation {
  Channel& channel;
  wire::Stream& stream;
  FrameReader reader;
  ChannelEnd end;
  std::vector<wire::KnownName> names{};  // taken, and not told yet
  Clock::time_point told_taken_at = Clock::now();

  bool bad(const char* message, const char* code = "PROTOCOL") {
    end = {ChannelEnd::Kind::kBadFrame, code, message};
    return false;
  }
  bool lost(const wire::IoResult& io) {
    // EFAULT is our own memory, not the connection.
    const bool memory = io.kind == wire::IoResult::Kind::kCut && io.error == EFAULT;
    end = {memory ? ChannelEnd::Kind::kFatal : ChannelEnd::Kind::kCut, memory ? "SYSTEM" : "CHANNEL_LOST",
           memory ? "no memory for the pages that arrive" : io.describe()};
    return false;
  }
  bool read(std::span<std::byte> into) {
    const wire::IoResult io = reader.read(into);
    return io.done() || lost(io);
  }
  // Reads the payload into the staging buffer and checks it against the header.
  bool read_checked_payload(const wire::FrameHeader& header, std::vector<std::byte>& staging) {
    staging.resize(header.payload_bytes);
    if (!read(staging)) return false;
    return wire::payload_checksum(header, staging) == header.checksum ||
           bad("checksum of a frame", "CHECKSUM");
  }
  bool check_no_payload(const wire::FrameHeader& header) {
    return wire::payload_checksum(header, {}) == header.checksum || bad("checksum of a frame", "CHECKSUM");
  }
};

}  // namespace memferry
