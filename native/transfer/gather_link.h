// One connection of the gather to one server, and its thread: it dials (again and again, until the server counts as
// failed), asks, reads answers and hands them over.
//
//   ahead   asks for what the server's todo list has, several reads at a time, slower while somebody waits for a page
//   demand  asks for what the pager wants, at once
//
// Threads: its own; ask(), want_map() and wake() from any.
#pragma once

#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "os/unique_fd.h"
#include "os/worker_thread.h"
#include "transfer/gather.h"
#include "wire/run_decoder.h"
#include "wire/stream.h"

namespace memferry {

class GatherLink {
 public:
  using Clock = std::chrono::steady_clock;
  // A server that answers nothing for so long, nor says that the answer waits for its turn, is down.
  static constexpr std::chrono::milliseconds kAnswerPatience{2000};
  // A frame that has begun comes no more slowly than this; nor does a map as a whole, beyond kMapPatience. Slow as a
  // link may be that many share: who gives up its server gives up pages.
  static constexpr std::uint64_t kLeastBytesASecond = 4ULL << 10;
  static constexpr std::chrono::milliseconds kMapPatience{30000};
  // Of a map, for each page of the image: it tells of each once.
  static constexpr std::uint64_t kMostTold = 2;
  // Filled again when half of it has been answered: a read may be short where zeros lie between, and each costs a call.
  static constexpr std::uint64_t kWindowBytes = 1ULL << 20;
  // While somebody waits for a page here and there: so much at a time, and one read over all servers. Who walks forward
  // waits for what is read ahead, and for as much of it as there can be.
  static constexpr std::uint64_t kSmallRead = 16ULL << 10;
  // The same where this side is given little CPU, and the source sends nothing any more: then the guest uses all of it
  // while an answer is waited for, and each answer costs a waking. kStarved: of the time, waiting for a CPU.
  static constexpr double kStarved = 0.5;
  static constexpr std::uint64_t kStarvedRead = 128ULL << 10;
  static constexpr unsigned kStarvedReads = 2;
  static constexpr unsigned kWrongForgiven = 16;
  // While the source sends too, one read at a time; and when the round trip is longer than an idle one by kQueue,
  // both fill the same link: then a pause of kYield times what the read took.
  static constexpr std::chrono::microseconds kQueue{2000};
  static constexpr int kYield = 12;
  static constexpr std::chrono::milliseconds kLongestYield{500};

  GatherLink(Gather& gather, Gather::Server& server, wire::StageRole role);
  ~GatherLink() { stop(); }
  GatherLink(const GatherLink&) = delete;
  GatherLink& operator=(const GatherLink&) = delete;
  void start();
  // Demand: false when the connection is not up.
  bool ask(std::uint32_t region, PageRun run);
  // None while the connection is not up.
  [[nodiscard]] std::optional<std::chrono::microseconds> round_trip() const;
  // An answer with this page in it is outstanding, or being looked at.
  [[nodiscard]] bool under_way(std::uint32_t region, PageNumber page) const;
  void want_map();
  void wake();
  void shut_down();
  void stop();

 private:
  struct Read {
    std::uint64_t id = 0;
    std::uint32_t region = 0;
    PageRun run;
    std::uint64_t covered = 0;            // pages of it that were answered
    std::vector<std::uint64_t> expected;  // the pages' hashes when it was asked
    Clock::time_point asked;
    std::unique_ptr<GatherBase::Check> check;  // not pages: what they are, for the base
  };
  void main(WorkerThread& self);
  void run_once(WorkerThread& self, std::shared_ptr<wire::Stream>& stream, std::string& why, bool& for_good,
                std::chrono::milliseconds& backoff);
  // Until the connection is over; gives why.
  std::string serve(WorkerThread& self, wire::Stream& stream);
  bool ask_ahead(wire::Stream& stream, std::string& why);
  void choose_ahead();
  wire::FrameHeader note_read(std::uint32_t region, PageRun run);
  void note_check(std::unique_ptr<GatherBase::Check> check);
  // By which so many bytes have come, at the slowest that is borne with.
  static Clock::duration time_for(std::uint64_t bytes) {
    return std::chrono::microseconds(bytes * 1000000 / kLeastBytesASecond);
  }
  std::string read_frame(wire::Stream& stream);
  // Waits until frame_due_, to which it adds the time for so many bytes.
  std::string read(wire::Stream& stream, std::span<std::byte> into);
  std::string on_answer(wire::Stream& stream, const wire::FrameHeader& header);
  std::string on_turn(const wire::FrameHeader& header);
  std::string on_pages(const wire::FrameHeader& header);
  std::string on_map(wire::Stream& stream, const wire::FrameHeader& header);
  std::string bound_map(const wire::FrameHeader& header);
  bool next_run(std::uint64_t max_pages, std::uint32_t& region, PageRun& run);
  [[nodiscard]] std::chrono::milliseconds dial_timeout() const;
  [[nodiscard]] std::chrono::milliseconds longest_backoff() const;
  void give_back_reads();
  // By the thread itself.
  [[nodiscard]] bool is_asked() const;
  // What is wrong with a frame, "" when it was right.
  std::string progressed(std::string why);
  void yield_to_source(wire::Stream& stream, Clock::duration took);

  Gather& gather_;
  Gather::Server& server_;
  const wire::StageRole role_;
  const bool ahead_;
  const std::uint16_t encodings_;  // that answers may have: what somebody waits for comes as it is
  std::uint32_t attempt_ = 0;
  // Connections one after the other that were asked something and gave no right answer; whether this one has.
  unsigned barren_ = 0;
  bool progressed_ = false;
  // The thread's own:
  std::vector<std::byte> payload_;
  std::vector<std::byte> decoded_;
  wire::RunDecoder decoder_;
  std::vector<std::uint64_t> hashes_;
  std::vector<std::uint64_t> expected_;
  std::vector<wire::FrameHeader> asking_;  // noted, and to be sent
  GatherCursor at_;
  RunDelay run_delay_;
  Clock::time_point limited_until_{};  // nothing is read ahead until then: gatherLimit
  bool map_under_way_ = false;
  Clock::time_point map_asked_{};
  Clock::time_point map_due_{};       // what was told so far gives it more time
  std::uint64_t map_pages_left_ = 0;  // that it may still tell of
  Clock::time_point frame_due_{};
  bool for_good_ = false;  // why the connection ended is no reason to try again
  Clock::time_point silent_since_;
  Clock::time_point answered_at_{};  // the last frame that was an answer

  mutable std::mutex mutex_;  // guards the rest; held while a request is written, so that it is whole
  std::shared_ptr<wire::Stream> stream_;
  std::deque<Read> reads_;
  std::uint64_t next_id_ = 1;
  bool map_wanted_ = false;
  std::atomic<bool> started_{false};
  WorkerThread thread_;
};

}  // namespace memferry
