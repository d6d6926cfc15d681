// What a destination has of a parked guest before it gathers it: image files, of the guest as it was when it left here,
// or of one that is like it. What is the same there does not come over the network.
//
//   held     pages that are not gathered ahead of the guest yet: they may be in an image
//   compare  a piece of an image is read, and the XXH3 of its pages compared with the map's. A page that differs is the
//            gather's from then on.
//   ask      of pages that do not, a server that has them is asked for their hashes, under the session's key, which is
//            fresh and nobody else's (page/keyed_hash.h): by XXH3 alone a page that somebody has made for it would do
//   install  what has that hash as well, from the bytes that were hashed: whoever writes the file meanwhile changes
//            nothing
//
// A fault never waits for any of it: what somebody waits for is asked for on demand, held or not, and the first copy of
// a page that comes is the one that counts. An image that cannot be read, or is read too slowly, is let go of.
//
// Memory: two bits a page, and kMostChecks pieces.
//
// Threads: one of its own has the image read (transfer/image_reader.h) and compares; links ask, and bring the answers. `mutex_` guards what waits to be asked
// and is not held over a system call, nor while a check goes.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "os/worker_thread.h"
#include "page/bitmap.h"
#include "page/keyed_hash.h"
#include "transfer/image_reader.h"
#include "wire/frame.h"

namespace memferry {

class Gather;

// Byte n of the region is byte offset + n of the file. An empty path: the region has none.
struct BaseImage {
  std::string path;
  std::uint64_t offset_bytes = 0;
};

// Where reading ahead is: behind the last fault, or else where it was.
struct GatherCursor {
  std::uint32_t region = 0;
  PageNumber page{0};
  std::uint64_t seen_moves = 0;
};

class GatherBase {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr std::size_t kMostChecks = 32;
  // Of these, with one server: as with reads, more would only lie there.
  static constexpr std::size_t kChecksAtOnce = 16;
  // For the map to be here whole, and then for servers to be up: what is not by then is gathered.
  static constexpr std::chrono::milliseconds kMapPatience{30000};
  static constexpr std::chrono::milliseconds kServerPatience{2000};
  // For one of kMostChecks answers.
  static constexpr std::chrono::milliseconds kAnswerPatience{4000};
  // A disk that gives a piece no sooner, or less than this over kRateWindow of reading, is no help.
  static constexpr std::chrono::milliseconds kReadPatience{2000};
  static constexpr std::chrono::milliseconds kRateWindow{2000};
  static constexpr std::uint64_t kLeastBytesASecond = 16ULL << 20;

  struct Stats {
    std::uint64_t pages_compared = 0;
    std::uint64_t memory_bytes = 0;
    std::string problem;  // why not all of it was compared; empty: it was, or is being
  };

  // Pages of one run, some of them `wanted`, that one server is asked about. When it goes, whatever became of it, what
  // did not come from it is gathered.
  struct Check {
    Check(GatherBase& of, std::uint32_t in, PageRun pages) : base(of), region(in), run(pages) {}
    ~Check();
    Check(const Check&) = delete;
    Check& operator=(const Check&) = delete;

    GatherBase& base;
    const std::uint32_t region;
    const PageRun run;
    std::vector<std::byte> bytes;
    std::vector<std::uint64_t> xxh3;  // this and the rest: one a page
    std::vector<KeyedHash> hashes;    // of those that are wanted
    std::vector<bool> wanted;
    std::vector<bool> same;
  };

  // `images` one a region; those that are missing at the end have none.
  GatherBase(Gather& gather, std::vector<BaseImage> images);
  ~GatherBase() { close(); }
  GatherBase(const GatherBase&) = delete;
  GatherBase& operator=(const GatherBase&) = delete;
  void start();

  // The page is not to be gathered ahead of the guest now.
  [[nodiscard]] bool holds(std::uint32_t region, PageNumber page) const { return held_[region]->test(page); }
  // A server has told of all that it knows.
  void map_known();

  // For links. The server is asked about these next; nullptr: nothing.
  std::unique_ptr<Check> next(std::uint8_t ordinal);
  // What was answered for the pages from `first` on.
  static void answered(Check& check, PageNumber first, std::span<const std::byte> hashes);
  // Installs what is the same.
  void finish(std::unique_ptr<Check> check);
  // Who does not answer such questions is asked no more of them.
  void refused(std::uint8_t ordinal);
  // A server is down, or has failed: what waits for it is gathered.
  void drop(std::uint8_t ordinal);

  [[nodiscard]] Stats stats() const;
  void shut_down();
  void close();  // after the links have ended

 private:
  void main(WorkerThread& self);
  void await_map(WorkerThread& self);
  [[nodiscard]] bool going_on() const { return !thread_.stopping() && !abandoned_; }
  bool next_piece(std::uint32_t& region, PageRun& run);
  void compare(std::uint32_t region, PageRun run);
  // How many whole pages there were; nothing when the image is of no more use.
  std::optional<std::uint64_t> read(std::uint32_t region, PageRun run);
  void ask(std::uint32_t region, PageRun run);
  bool take_place();
  bool let_go(std::uint32_t region, PageRun run);
  void release(std::uint32_t region, PageRun run);
  void release_rest(std::uint32_t region, PageNumber from);
  void release_everything();
  void abandon(const std::string& why);
  void note_problem(const std::string& why);

  Gather& gather_;
  const std::vector<BaseImage> images_;
  std::vector<std::unique_ptr<AtomicBitmap>> held_;        // one a region
  std::vector<std::unique_ptr<AtomicBitmap>> uncompared_;  // of these, those that nobody has looked at
  std::atomic<bool> map_known_{false};
  std::atomic<bool> abandoned_{false};
  std::atomic<bool> closing_{false};                                     // nothing is gathered any more
  std::array<std::atomic<bool>, wire::Holders::kMostServers> silent_{};  // do not answer such questions
  std::atomic<std::uint64_t> pages_compared_{0};

  // The thread's own:
  ImageReader reader_;
  std::vector<std::byte> bytes_;
  std::vector<std::uint64_t> xxh3_;
  std::vector<std::uint8_t> ask_whom_;                 // one a page of the piece; kNobody: it differs
  std::vector<std::unique_ptr<KeyedHasher>> hashers_;  // by server; nullptr: it has no key with us
  GatherCursor cursor_;
  std::uint64_t bytes_read_ = 0;
  Clock::duration reading_took_{};

  mutable std::mutex mutex_;  // guards the rest
  std::condition_variable changed_;
  std::vector<std::deque<std::unique_ptr<Check>>> ready_;  // by server
  std::size_t checks_ = 0;                                 // in ready_ and with links
  std::uint32_t piece_region_ = 0;                         // what the thread is at
  PageRun piece_{};
  std::string problem_;
  WorkerThread thread_;
};

}  // namespace memferry
