// What the files of a stage share: what all connections of a server use, an image with its sessions, and a
// connection.
//
// Order of locks: Stage::Impl, then a connection's or PopularPages'; an image's or a HintTable's; Popularity's, which the
// slab's relief takes; the slab's. No lock of the stage is held while a thread is waited for or a socket written.
#pragma once

#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "os/worker_thread.h"
#include "stage/codec_seats.h"
#include "stage/content_domain.h"
#include "stage/image.h"
#include "stage/member_desks.h"
#include "stage/popular_pages.h"
#include "stage/slab.h"
#include "stage/stage.h"
#include "stage/stage_chain.h"
#include "wire/bandwidth_cap.h"
#include "wire/run_compressor.h"
#include "wire/socket.h"
#include "wire/stream.h"

namespace memferry {

// What every connection of a server uses.
struct StageCommon {
  explicit StageCommon(const StageConfig& config);
  const std::shared_ptr<Slab> slab;
  const std::shared_ptr<ContentHints> hints;
  const std::shared_ptr<PopularPages> popular;
  wire::BandwidthCap in;
  wire::BandwidthCap out;
  std::atomic<std::uint64_t> bytes_in{0};
  std::atomic<std::uint64_t> bytes_out{0};
  std::atomic<std::size_t> connections{0};         // whose threads run
  std::atomic<std::size_t> member_connections{0};  // of these
  const std::size_t most_member_connections;
  MemberDesks desks;
  const std::uint64_t member_timeout_ms;
  const ChainTimeouts chain_timeouts;
  CodecSeats codecs;
  wire::EncodingCounters packed;  // answers to reading ahead
};

// Who a kPopular connection is.
struct Member {
  std::shared_ptr<PopularDomain> domain;
  std::optional<unsigned> seat;  // none: it may not report
};

// One connection of a source, a destination or another server, and the thread that serves it.
class StageConnection {
 public:
  struct Place {
    std::shared_ptr<StageCommon> common;
    std::shared_ptr<Image> image;  // nullptr: kPopular, which is a member's
    std::shared_ptr<ChainTargets> chains;
    std::shared_ptr<const Member> member{};
    std::uint16_t session = 0;
    wire::StageRole role = wire::StageRole::kScatter;
    std::uint32_t epoch = 0;                  // as its hello says
    std::optional<wire::TreeKey> hash_key{};  // of the session
  };
  // The right kind for the role. The thread first waits for the connection that this one replaces: frames of the two
  // must not mix.
  static std::shared_ptr<StageConnection> start(Place place, UniqueFd fd,
                                                std::shared_ptr<StageConnection> predecessor);
  virtual ~StageConnection();
  StageConnection(const StageConnection&) = delete;
  StageConnection& operator=(const StageConnection&) = delete;

  // Makes the thread end soon, whatever it waits for. Any thread, any number of times.
  void interrupt();
  // Waits for the thread's end. Any threads but its own.
  void join();
  // Nothing is left to do but join(), which no longer waits.
  [[nodiscard]] bool ended() const { return ended_; }
  [[nodiscard]] const Place& place() const { return place_; }

 protected:
  StageConnection(Place place, UniqueFd fd);
  // On the thread, until the connection is over. Throws what it cannot handle: the connection ends.
  virtual void serve() = 0;
  // What else its thread may be waiting for. Several threads, several times; the thread is stopping already.
  virtual void interrupt_more() {}

  // Reads and checks the next header; false when the connection is over.
  bool read_header(wire::FrameHeader& header);
  bool read(std::span<std::byte> into);
  // A payload that waits for no turn, and counts all the same.
  bool read_counted(std::span<std::byte> into);
  // False as well when it is not all here by then. A call waits no longer than the socket does.
  bool read_until(std::uint64_t deadline_ms, std::span<std::byte> into);
  bool read_scattered(std::span<iovec> into);  // of a writer only
  // Of a frame that carries nothing.
  [[nodiscard]] static bool bare_checksum_fits(const wire::FrameHeader& header);
  [[nodiscard]] bool inside(const wire::FrameHeader& header) const;
  // Whatever it is counts against the server's bandwidth; what may wait has waited before (await_turn()).
  bool send(std::span<iovec> buffers);
  void count_out(std::uint64_t bytes);
  [[nodiscard]] int fd() const { return stream_->fd(); }  // for socket statistics
  void count_in(std::uint64_t bytes);
  // Until the server's bandwidth allows something more in this direction, against which the bytes count. False when the
  // connection is over.
  bool await_turn(wire::BandwidthCap& cap, std::uint64_t bytes);
  // The same for what somebody waits for: not at all, unless the server is far ahead of its rate. Debits nothing.
  bool await_urgent_turn(wire::BandwidthCap& cap);
  // Called now and then while the thread waits for its turn: tells the peer. False when the connection is over.
  virtual bool tell_waiting() { return true; }

  Place place_;
  const std::uint64_t page_size_;
  WorkerThread thread_;

 private:
  void run();

  // Small frames are taken several in one system call where the peer sends no payloads.
  static constexpr std::size_t kBufferBytes = 4096;

  std::unique_ptr<wire::Stream> stream_;
  std::vector<std::byte> buffer_;
  std::size_t buffer_begin_ = 0;
  std::size_t buffer_end_ = 0;
  std::shared_ptr<StageConnection> predecessor_;
  std::atomic<bool> ended_{false};
  std::mutex join_mutex_;
  std::mutex stream_mutex_;  // guards stream_ against the thread's closing it
};

}  // namespace memferry
