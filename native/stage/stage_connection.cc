#include "stage/stage_connection.h"

#include <algorithm>
#include <cstring>
#include <exception>

#include "os/steady_ms.h"

namespace memferry {

StageConnection::StageConnection(Place place, UniqueFd fd)
    : place_(std::move(place)),
      page_size_(place_.common->slab->slot_bytes()),
      stream_(std::make_unique<wire::PlainStream>(std::move(fd))) {
  const bool writer = place_.role == wire::StageRole::kScatter || place_.role == wire::StageRole::kChain;
  // A writer's payloads go straight to where they belong.
  if (!writer) buffer_.resize(kBufferBytes);
}

StageConnection::~StageConnection() { join(); }

std::shared_ptr<StageConnection> StageConnection::start(Place place, UniqueFd fd,
                                                        std::shared_ptr<StageConnection> predecessor) {
  const bool writer = place.role == wire::StageRole::kScatter || place.role == wire::StageRole::kChain;
  std::shared_ptr<StageConnection> made;
  if (place.role == wire::StageRole::kPopular) {
    made = std::make_shared<MemberConnection>(std::move(place), std::move(fd));
  } else if (place.role == wire::StageRole::kProbe) {
    made = std::make_shared<ProbingConnection>(std::move(place), std::move(fd));
  } else if (writer) {
    made = std::make_shared<WritingConnection>(std::move(place), std::move(fd));
  } else {
    made = std::make_shared<ReadingConnection>(std::move(place), std::move(fd));
  }
  made->predecessor_ = std::move(predecessor);
  StageCommon& common = *made->place_.common;
  common.connections.fetch_add(1);
  if (made->place_.member) common.member_connections.fetch_add(1);
  try {
    made->thread_.start(writer ? "mf-stage-write" : "mf-stage-read",
                        [self = made.get()](WorkerThread&) { self->run(); });
  } catch (...) {
    common.connections.fetch_sub(1);
    if (made->place_.member) common.member_connections.fetch_sub(1);
    throw;
  }
  return made;
}

void StageConnection::run() {
  if (predecessor_) {
    predecessor_->interrupt();
    predecessor_->join();
    predecessor_.reset();
  }
  try {
    if (!thread_.stopping()) serve();
  } catch (const std::exception&) {
    // No memory, or no thread for a chain: the peer sees a cut, as it would of a server that has gone.
  }
  interrupt_more();
  {
    const std::lock_guard lock(stream_mutex_);
    stream_->shutdown();
    stream_.reset();
  }
  // First: who sees that there are fewer must find room for one more.
  ended_ = true;
  if (place_.member) place_.common->member_connections.fetch_sub(1);
  place_.common->connections.fetch_sub(1);
}

void StageConnection::interrupt() {
  // First: whoever is about to wait for something looks at it after having said what for.
  thread_.request_stop();
  {
    const std::lock_guard lock(stream_mutex_);
    if (stream_) stream_->shutdown();
  }
  interrupt_more();
}

void StageConnection::join() {
  const std::lock_guard lock(join_mutex_);
  thread_.stop();
}

bool StageConnection::read(std::span<std::byte> into) {
  while (!into.empty()) {
    if (buffer_begin_ == buffer_end_) {
      if (into.size() >= buffer_.size()) return stream_->recv_exact(into).done();
      if (!stream_->recv_some(buffer_, buffer_end_).done()) return false;
      buffer_begin_ = 0;
    }
    const std::size_t take = std::min(into.size(), buffer_end_ - buffer_begin_);
    std::memcpy(into.data(), buffer_.data() + buffer_begin_, take);
    buffer_begin_ += take;
    into = into.subspan(take);
  }
  return true;
}

bool StageConnection::read_counted(std::span<std::byte> into) {
  if (!read(into)) return false;
  count_in(into.size());
  place_.common->in.debit(into.size());
  return true;
}

bool StageConnection::read_until(std::uint64_t deadline_ms, std::span<std::byte> into) {
  while (!into.empty()) {
    if (steady_ms() >= deadline_ms) return false;
    std::size_t taken = std::min(into.size(), buffer_end_ - buffer_begin_);
    if (taken > 0) {
      std::memcpy(into.data(), buffer_.data() + buffer_begin_, taken);
      buffer_begin_ += taken;
    } else if (!stream_->recv_some(into, taken).done()) {
      return false;
    }
    into = into.subspan(taken);
  }
  return true;
}

bool StageConnection::read_scattered(std::span<iovec> into) { return stream_->recv_scattered(into).done(); }

bool StageConnection::read_header(wire::FrameHeader& header) {
  if (!read_counted(std::as_writable_bytes(std::span(&header, 1)))) return false;
  // What a socket holds can be read after its shutdown too.
  if (thread_.stopping()) return false;
  return wire::malformed(header, page_size_) == nullptr;
}

bool StageConnection::bare_checksum_fits(const wire::FrameHeader& header) {
  return header.payload_bytes == 0 && wire::payload_checksum(header, {}) == header.checksum;
}

bool StageConnection::inside(const wire::FrameHeader& header) const {
  return place_.image->inside(header.region, header.first_page, header.page_count);
}

bool StageConnection::send(std::span<iovec> buffers) {
  const std::uint64_t bytes = bytes_of(buffers);
  count_out(bytes);
  place_.common->out.debit(bytes);
  return stream_->send_all(buffers).done();
}

void StageConnection::count_out(std::uint64_t bytes) {
  if (place_.image) place_.image->bytes_out.fetch_add(bytes, std::memory_order_relaxed);
  place_.common->bytes_out.fetch_add(bytes, std::memory_order_relaxed);
}

void StageConnection::count_in(std::uint64_t bytes) {
  if (place_.image) place_.image->bytes_in.fetch_add(bytes, std::memory_order_relaxed);
  place_.common->bytes_in.fetch_add(bytes, std::memory_order_relaxed);
}

bool StageConnection::await_turn(wire::BandwidthCap& cap, std::uint64_t bytes) {
  for (wire::BandwidthCap::Place place(cap);;) {
    switch (wire::BandwidthCap::wait_and_debit(bytes, thread_, wire::kTellWork, place)) {
      case wire::BandwidthCap::Turn::kNow:
        return true;
      case wire::BandwidthCap::Turn::kStopped:
        return false;
      case wire::BandwidthCap::Turn::kLater:
        if (!tell_waiting()) return false;
    }
  }
}

bool StageConnection::await_urgent_turn(wire::BandwidthCap& cap) {
  using Clock = std::chrono::steady_clock;
  auto told = Clock::now();
  for (;;) {
    if (thread_.stopping()) return false;
    const wire::Duration delay = cap.urgent_delay();
    if (delay == wire::Duration::zero()) return true;
    const auto now = Clock::now();
    if (now - told >= wire::kTellWork) {
      if (!tell_waiting()) return false;
      told = now;
    }
    const auto sleep = std::min<wire::Duration>(delay, told + wire::kTellWork - now);
    thread_.wait(static_cast<int>(std::chrono::ceil<std::chrono::milliseconds>(sleep).count()));
  }
}

std::uint64_t bytes_of(std::span<const iovec> buffers) {
  std::uint64_t bytes = 0;
  for (const iovec& buffer : buffers) bytes += buffer.iov_len;
  return bytes;
}

void append_slots(const Slab& slab, std::span<const Slab::Slot> slots, std::vector<iovec>& to) {
  for (std::size_t from = 0; from < slots.size();) {
    std::size_t end = from + 1;
    while (end < slots.size() && slots[end] == slots[end - 1] + 1) ++end;
    to.push_back({slab.data(slots[from]), (end - from) * static_cast<std::size_t>(slab.slot_bytes())});
    from = end;
  }
}

void append_slots(const Slab& slab, std::span<const Slab::Slot> slots, std::size_t bytes,
                  std::vector<iovec>& to) {
  append_slots(slab, slots, to);
  to.back().iov_len -= slots.size() * static_cast<std::size_t>(slab.slot_bytes()) - bytes;
}

}  // namespace memferry
