// The destination's writing end of the demand channel: fault requests from the pager's thread and answers to
// barriers from the thread that reads the channel share one stream, and each frame goes out whole.
//
// Threads: any.
#pragma once

#include <chrono>
#include <memory>
#include <mutex>
#include <optional>
#include <span>

#include "wire/frame.h"
#include "wire/link_meter.h"
#include "wire/stream.h"

namespace memferry {

class DemandWriter {
 public:
  void attach(std::shared_ptr<wire::Stream> stream) {
    const std::lock_guard lock(mutex_);
    stream_ = std::move(stream);
  }
  void detach() { attach(nullptr); }

  // False when there is no stream or it is cut; the thread that reads the stream notices the cut too, and
  // everything that is still wanted is asked for again on the next stream. May block while the socket's
  // buffer is full, for at most wire::kSilenceLimit: the kernel then gives the connection up.
  bool send(const wire::FrameHeader& header) {
    const std::lock_guard lock(mutex_);
    return stream_ && stream_->send_all(std::as_bytes(std::span(&header, 1))).done();
  }

  // Of the stream as it is without load; none without a stream.
  [[nodiscard]] std::optional<std::chrono::microseconds> round_trip() {
    const std::lock_guard lock(mutex_);
    return stream_ ? wire::shortest_round_trip(stream_->fd()) : std::nullopt;
  }

 private:
  std::mutex mutex_;  // guards stream_, and keeps frames whole
  std::shared_ptr<wire::Stream> stream_;
};

}  // namespace memferry
