// A connected, ordered byte stream: what data and demand channels write to and read from. The seam for TLS:
// everything above this file only knows Stream.
//
// Threads: one sender and one receiver at a time, which may be two threads; shutdown() from any thread, any
// number of times, wakes both. The descriptor is closed by the destructor, so whoever destroys the stream
// has joined its users.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <span>
#include <string>

#include "os/unique_fd.h"

namespace memferry::wire {

// The outcome of an operation on a stream. The end of a connection is an expected outcome, not an exception.
struct IoResult {
  enum class Kind {
    kDone,  // every byte
    kEnd,   // the peer closed in order, before the first byte (receiving only)
    kCut,   // anything else: `error` is the errno, 0 when the peer closed in the middle
  };
  Kind kind = Kind::kDone;
  int error = 0;
  [[nodiscard]] bool done() const { return kind == Kind::kDone; }
  [[nodiscard]] std::string describe() const;
};

class Stream {
 public:
  Stream() = default;
  virtual ~Stream() = default;
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  // Writes all of the buffers, in order, blocking as long as it takes. The elements of `buffers` are changed.
  virtual IoResult send_all(std::span<iovec> buffers) = 0;
  // Fills the buffer, blocking as long as it takes.
  virtual IoResult recv_exact(std::span<std::byte> buffer) = 0;
  // Fills all of the buffers, in order, blocking as long as it takes. The elements of `buffers` are changed.
  virtual IoResult recv_scattered(std::span<iovec> buffers);
  // Blocks for at least one byte, takes at most buffer.size(); `received` is how many. For readers with a
  // buffer of their own.
  virtual IoResult recv_some(std::span<std::byte> buffer, std::size_t& received) = 0;
  // Ends both directions. Blocked calls return kCut or kEnd; what was sent before is still delivered.
  virtual void shutdown() = 0;
  // For poll and socket statistics only.
  [[nodiscard]] virtual int fd() const = 0;

  IoResult send_all(std::span<const std::byte> bytes);
};

// A TCP socket as it is. Takes a connected, blocking descriptor.
class PlainStream final : public Stream {
 public:
  explicit PlainStream(UniqueFd fd) : fd_(std::move(fd)) {}
  using Stream::send_all;
  IoResult send_all(std::span<iovec> buffers) override;
  IoResult recv_exact(std::span<std::byte> buffer) override;
  IoResult recv_scattered(std::span<iovec> buffers) override;
  IoResult recv_some(std::span<std::byte> buffer, std::size_t& received) override;
  void shutdown() override;
  [[nodiscard]] int fd() const override { return fd_.get(); }

 private:
  const UniqueFd fd_;
};

}  // namespace memferry::wire
