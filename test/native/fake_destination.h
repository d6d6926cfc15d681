// A destination for tests of the source: speaks the wire over real loopback sockets, checks every frame that
// arrives, keeps the pages in a plain model, and does what the test tells it to do wrong.
#pragma once

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "page/hash.h"
#include "transfer/sender.h"
#include "wire/frame.h"
#include "wire/socket.h"
#include "wire/stream.h"

namespace memferry::sender_test {

inline constexpr std::chrono::seconds kTestPatience{20};

// Events of an engine, to be waited for in order.
class EventLog {
 public:
  EngineCallback callback() {
    return [this](const EngineEvent& event) {
      const std::lock_guard lock(mutex_);
      events_.push_back(event);
      changed_.notify_all();
    };
  }
  // The next event that has not been taken; fails the test when none comes.
  EngineEvent next() {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_for(lock, kTestPatience, [this] { return !events_.empty(); })) {
      ADD_FAILURE() << "no event came";
      EngineEvent none;
      none.kind = EngineEventKind::kFailed;
      none.code = "TEST_TIMEOUT";
      return none;
    }
    EngineEvent event = events_.front();
    events_.pop_front();
    return event;
  }
  EngineEvent expect(EngineEventKind kind) {
    EngineEvent event = next();
    EXPECT_EQ(static_cast<int>(event.kind), static_cast<int>(kind)) << event.code << " " << event.message;
    return event;
  }
  bool empty() {
    const std::lock_guard lock(mutex_);
    return events_.empty();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<EngineEvent> events_;
};

struct SeenFrame {
  unsigned channel = 0;  // config.channels for the demand channel
  wire::FrameHeader header{};
  wire::FrameType type() const { return static_cast<wire::FrameType>(header.type); }
};

class FakeDestination {
 public:
  struct Options {
    unsigned channels = 2;
    std::vector<std::uint64_t> pages;  // of each region
    std::uint64_t page_size = 4096;
  };

  explicit FakeDestination(Options options)
      : options_(std::move(options)),
        listening_(wire::listen_on(wire::SocketAddress::parse("127.0.0.1", 0))),
        port_(wire::SocketAddress::local(listening_.get()).port()) {
    for (const std::uint64_t pages : options_.pages) {
      memory.emplace_back(pages * options_.page_size, std::byte{0xee});
      have.emplace_back(pages, false);
    }
  }
  ~FakeDestination() {
    cut();
    stop();
  }

  std::uint16_t port() const { return port_; }
  static wire::Token token(std::uint32_t epoch, unsigned channel) {
    wire::Token token{};
    token[0] = static_cast<std::uint8_t>(epoch + 1);
    token[1] = static_cast<std::uint8_t>(channel);
    return token;
  }
  static std::vector<wire::Token> tokens(unsigned channels, unsigned epochs = 8) {
    std::vector<wire::Token> all;
    for (unsigned epoch = 0; epoch < epochs; ++epoch) {
      for (unsigned channel = 0; channel <= channels; ++channel) all.push_back(token(epoch, channel));
    }
    return all;
  }

  void wait_for_dial() const {
    pollfd polled{listening_.get(), POLLIN, 0};
    EXPECT_EQ(::poll(&polled, 1, static_cast<int>(kTestPatience.count() * 1000)), 1) << "nobody dials";
  }
  // Accepts one connection and reads its hello.
  std::pair<wire::Hello, std::unique_ptr<wire::PlainStream>> accept_hello() {
    wait_for_dial();
    auto stream = std::make_unique<wire::PlainStream>(
        UniqueFd(::accept4(listening_.get(), nullptr, nullptr, SOCK_CLOEXEC)));
    wire::Hello hello{};
    EXPECT_TRUE(stream->recv_exact(std::as_writable_bytes(std::span(&hello, 1))).done());
    return {hello, std::move(stream)};
  }
  static void reply(wire::Stream& stream, wire::HelloStatus status) {
    const wire::HelloReply answer{wire::kFrameMagic, static_cast<std::uint32_t>(status)};
    EXPECT_TRUE(stream.send_all(std::as_bytes(std::span(&answer, 1))).done());
  }

  // Accepts every connection of an epoch and starts a thread for each; after an epoch > 0 the bitmap goes
  // out first.
  void accept_epoch(std::uint32_t epoch = 0) {
    streams_.clear();
    streams_.resize(options_.channels + 1);
    for (unsigned i = 0; i <= options_.channels; ++i) {
      auto [hello, stream] = accept_hello();
      EXPECT_EQ(hello.preface, wire::kDataPreface);
      EXPECT_EQ(hello.version, wire::kVersion);
      EXPECT_EQ(hello.epoch, epoch);
      const unsigned channel = hello.channel == wire::kDemandChannel ? options_.channels : hello.channel;
      ASSERT_LE(channel, options_.channels);
      EXPECT_EQ(hello.token, token(epoch, channel));
      reply(*stream, wire::HelloStatus::kAccepted);
      ASSERT_FALSE(streams_[channel]);
      streams_[channel] = std::move(stream);
    }
    if (epoch > 0) send_bitmap();
    for (unsigned i = 0; i <= options_.channels; ++i) {
      threads_.emplace_back([this, i, stream = streams_[i].get()] { serve(i, *stream); });
    }
  }
  wire::PlainStream& stream(unsigned channel) { return *streams_[channel]; }
  wire::PlainStream& demand() { return *streams_[options_.channels]; }

  void cut() {
    for (auto& stream : streams_) {
      if (stream) stream->shutdown();
    }
  }
  void stop() {
    for (auto& thread : threads_) thread.join();
    threads_.clear();
  }

  void send(unsigned channel, wire::FrameHeader header, std::span<const std::byte> payload = {}) {
    wire::seal(header, payload);
    send_raw(channel, header, payload);
  }
  void send_raw(unsigned channel, const wire::FrameHeader& header, std::span<const std::byte> payload = {}) {
    const std::lock_guard lock(send_mutex_);
    (void)streams_[channel]->send_all(std::as_bytes(std::span(&header, 1)));
    if (!payload.empty()) (void)streams_[channel]->send_all(payload);
  }
  void request_fault(std::uint32_t region, std::uint64_t page, std::uint64_t count = 1) {
    send(options_.channels,
         wire::make_header(wire::FrameType::kFaultRequest, region, PageRun{PageNumber{page}, count}));
  }
  void send_bitmap() {
    for (std::uint32_t region = 0; region < have.size(); ++region) {
      std::vector<std::uint64_t> words((have[region].size() + 63) / 64);
      {
        const std::lock_guard lock(mutex);
        for (std::size_t page = 0; page < have[region].size(); ++page) {
          if (have[region][page]) words[page / 64] |= 1ULL << (page % 64);
        }
      }
      send(options_.channels, wire::make_header(wire::FrameType::kBitmap, region),
           std::as_bytes(std::span(words)));
    }
    send(options_.channels, wire::make_header(wire::FrameType::kBitmapEnd));
  }

  // Waits until `done` is true of what has arrived; called with the mutex held.
  bool wait_for(const std::function<bool()>& done) {
    std::unique_lock lock(mutex);
    const bool fine = changed.wait_for(lock, kTestPatience, done);
    EXPECT_TRUE(fine) << "what was waited for never arrived";
    return fine;
  }
  std::vector<SeenFrame> frames() {
    const std::lock_guard lock(mutex);
    return seen;
  }
  std::size_t count(wire::FrameType type) {
    const std::lock_guard lock(mutex);
    std::size_t n = 0;
    for (const SeenFrame& frame : seen) n += frame.type() == type ? 1 : 0;
    return n;
  }

  // Called before a frame is applied, with the mutex not held. False: this thread ends, the frame is ignored.
  std::function<bool(const SeenFrame&)> on_frame;
  bool answer_barriers = true;
  bool answer_switch = true;
  std::function<std::uint64_t(const SeenFrame& barrier)> suspects;  // what the answer's page_count says

  std::mutex mutex;  // guards the rest
  std::condition_variable changed;
  std::vector<std::vector<std::byte>> memory;
  std::vector<std::vector<bool>> have;
  std::vector<SeenFrame> seen;
  bool goodbye = false;
  unsigned ended = 0;

 private:
  void serve(unsigned channel, wire::PlainStream& stream) {
    std::vector<std::byte> payload;
    for (;;) {
      SeenFrame frame;
      frame.channel = channel;
      if (!stream.recv_exact(std::as_writable_bytes(std::span(&frame.header, 1))).done()) break;
      const char* wrong = wire::malformed(frame.header, options_.page_size);
      EXPECT_EQ(wrong, nullptr) << wrong;
      if (wrong != nullptr) break;
      payload.resize(frame.header.payload_bytes);
      if (!payload.empty() && !stream.recv_exact(payload).done()) break;
      if (on_frame && !on_frame(frame)) break;
      apply(frame, payload);
      if (frame.type() == wire::FrameType::kGoodbye) break;
    }
    const std::lock_guard lock(mutex);
    ++ended;
    changed.notify_all();
  }

  void apply(const SeenFrame& frame, std::span<const std::byte> payload) {
    const wire::FrameHeader& h = frame.header;
    std::unique_lock lock(mutex);
    if (frame.type() == wire::FrameType::kPages) {
      std::vector<std::uint64_t> hashes(h.page_count);
      hash_pages(payload, options_.page_size, hashes.data());
      EXPECT_EQ(h.checksum, wire::pages_checksum(h, hashes));
    } else {
      EXPECT_EQ(h.checksum, wire::payload_checksum(h, payload));
    }
    switch (frame.type()) {
      case wire::FrameType::kPages:
      case wire::FrameType::kZero: {
        ASSERT_LT(h.region, memory.size());
        ASSERT_TRUE(wire::run_inside(h.first_page, h.page_count, have[h.region].size()));
        std::byte* at = memory[h.region].data() + h.first_page * options_.page_size;
        if (payload.empty()) {
          std::memset(at, 0, h.page_count * options_.page_size);
        } else {
          std::memcpy(at, payload.data(), payload.size());
        }
        for (std::uint64_t i = 0; i < h.page_count; ++i) have[h.region][h.first_page + i] = true;
        break;
      }
      case wire::FrameType::kDiscard:
        for (std::size_t at = 0; at < payload.size(); at += sizeof(wire::WireRun)) {
          wire::WireRun run{};
          std::memcpy(&run, payload.data() + at, sizeof run);
          ASSERT_TRUE(wire::run_inside(run.first_page, run.page_count, have[h.region].size()));
          for (std::uint64_t i = 0; i < run.page_count; ++i) {
            EXPECT_TRUE(have[h.region][run.first_page + i]) << "discard of a page that is not here";
            have[h.region][run.first_page + i] = false;
          }
          std::memset(memory[h.region].data() + run.first_page * options_.page_size, 0xdd,
                      run.page_count * options_.page_size);
        }
        break;
      default:
        break;
    }
    seen.push_back(frame);
    if (frame.type() == wire::FrameType::kGoodbye) goodbye = true;
    changed.notify_all();
    lock.unlock();
    if (frame.type() == wire::FrameType::kBarrier && answer_barriers) {
      wire::FrameHeader ack = wire::make_header(wire::FrameType::kBarrierAck, 0, {}, h.tag);
      ack.page_count = suspects ? suspects(frame) : 0;
      send(frame.channel, ack);
    }
    if (frame.type() == wire::FrameType::kSwitch && answer_switch) {
      send(0, wire::make_header(wire::FrameType::kSwitchAck));
    }
  }

  const Options options_;
  const UniqueFd listening_;
  const std::uint16_t port_;
  std::vector<std::unique_ptr<wire::PlainStream>> streams_;
  std::vector<std::thread> threads_;
  std::mutex send_mutex_;
};

}  // namespace memferry::sender_test
