// A scripted source over real loopback sockets, for the receiver's tests: it says exactly what the test wants
// said, right or wrong.
#pragma once

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <span>
#include <vector>

#include "os/unique_fd.h"
#include "page/hash.h"
#include "page/region.h"
#include "transfer/listener.h"
#include "transfer/receiver.h"
#include "wire/frame.h"
#include "wire/later_tokens.h"

namespace memferry::test {

using namespace std::chrono_literals;

inline constexpr auto kPatience = 20s;  // for what must happen; a test that waits this long has failed

inline std::vector<std::byte> random_bytes(std::size_t count, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::byte> bytes(count);
  for (std::size_t i = 0; i + 8 <= count; i += 8) {
    const std::uint64_t value = random() | 1;
    std::memcpy(bytes.data() + i, &value, 8);
  }
  return bytes;
}

class EventLog {
 public:
  EngineCallback callback() {
    return [this](const EngineEvent& event) {
      const std::lock_guard lock(mutex_);
      events_.push_back(event);
      changed_.notify_all();
    };
  }
  // The first event of this kind; fails the test when it does not come.
  EngineEvent wait(EngineEventKind kind, std::size_t nth = 0) {
    std::unique_lock lock(mutex_);
    EngineEvent found{};
    const bool came = changed_.wait_for(lock, kPatience, [&] {
      std::size_t seen = 0;
      for (const EngineEvent& event : events_) {
        if (event.kind == kind && seen++ == nth) {
          found = event;
          return true;
        }
      }
      return false;
    });
    EXPECT_TRUE(came) << "event " << static_cast<int>(kind) << " did not come";
    return found;
  }
  std::size_t count(EngineEventKind kind) {
    const std::lock_guard lock(mutex_);
    std::size_t seen = 0;
    for (const EngineEvent& event : events_) seen += event.kind == kind ? 1 : 0;
    return seen;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<EngineEvent> events_;
};

inline UniqueFd dial_loopback(std::uint16_t port) {
  UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) fd.reset();
  const int one = 1;
  if (fd) ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  timeval patience{20, 0};
  if (fd) ::setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
  return fd;
}

// One connection of the source.
class Wire {
 public:
  explicit Wire(UniqueFd fd) : fd_(std::move(fd)) {}
  [[nodiscard]] int fd() const { return fd_.get(); }
  void close() { fd_.reset(); }

  bool raw(const void* data, std::size_t bytes) {
    const auto* at = static_cast<const char*>(data);
    while (bytes > 0) {
      const ssize_t sent = ::send(fd_.get(), at, bytes, MSG_NOSIGNAL);
      if (sent <= 0) return false;
      at += sent;
      bytes -= static_cast<std::size_t>(sent);
    }
    return true;
  }
  // A process that was stopped and goes on finds its call interrupted, whatever it waits for.
  bool read(void* data, std::size_t bytes) {
    for (std::size_t done = 0; done < bytes;) {
      const ssize_t got = ::recv(fd_.get(), static_cast<std::byte*>(data) + done, bytes - done, MSG_WAITALL);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) return false;
      done += static_cast<std::size_t>(got);
    }
    return true;
  }
  // True when the peer ends this connection (and sends nothing more that counts) before patience ends.
  bool ended() {
    std::byte sink[4096];
    for (;;) {
      const ssize_t got = ::recv(fd_.get(), sink, sizeof sink, 0);
      if (got == 0) return true;
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return errno == ECONNRESET || errno == EPIPE;
    }
  }

  static wire::FrameHeader pages_header(std::uint32_t region, std::uint64_t first,
                                        std::span<const std::byte> bytes, std::uint64_t page_size) {
    std::vector<std::uint64_t> hashes(bytes.size() / page_size);
    hash_pages(bytes, page_size, hashes.data());
    wire::FrameHeader header =
        wire::make_header(wire::FrameType::kPages, region, {PageNumber{first}, hashes.size()});
    wire::seal_pages(header, page_size, hashes);
    return header;
  }
  bool pages(std::uint32_t region, std::uint64_t first, std::span<const std::byte> bytes,
             std::uint64_t page_size) {
    const std::uint64_t most = wire::max_payload(page_size);
    for (std::size_t at = 0; at < bytes.size(); at += most) {
      const auto part = bytes.subspan(at, std::min<std::size_t>(most, bytes.size() - at));
      const wire::FrameHeader header = pages_header(region, first + at / page_size, part, page_size);
      if (!raw(&header, sizeof header) || !raw(part.data(), part.size())) return false;
    }
    return true;
  }
  bool frame(wire::FrameType type, std::uint32_t region = 0, PageRun run = {}, std::uint64_t tag = 0,
             std::span<const std::byte> payload = {}) {
    wire::FrameHeader header = wire::make_header(type, region, run, tag);
    wire::seal(header, payload);
    return raw(&header, sizeof header) && raw(payload.data(), payload.size());
  }
  bool zeros(std::uint32_t region, std::uint64_t first, std::uint64_t count) {
    return frame(wire::FrameType::kZero, region, {PageNumber{first}, count});
  }
  bool discard(std::uint32_t region, const std::vector<wire::WireRun>& runs) {
    return frame(wire::FrameType::kDiscard, region, {}, 0, std::as_bytes(std::span(runs)));
  }
  struct Frame {
    wire::FrameHeader header{};
    std::vector<std::byte> payload;
  };
  // The next one, but for how far the receiver is: that comes when a second has passed.
  std::optional<Frame> receive() {
    auto frame = receive_any();
    while (frame && frame->header.type == static_cast<std::uint16_t>(wire::FrameType::kTaken))
      frame = receive_any();
    return frame;
  }
  std::optional<Frame> receive_any() {
    Frame frame;
    if (!read(&frame.header, sizeof frame.header)) return std::nullopt;
    frame.payload.resize(frame.header.payload_bytes);
    if (!read(frame.payload.data(), frame.payload.size())) return std::nullopt;
    EXPECT_EQ(frame.header.checksum, wire::payload_checksum(frame.header, frame.payload));
    return frame;
  }
  // The answer to a barrier, and the suspects named before it.
  struct Barrier {
    bool answered = false;
    std::uint64_t suspect_pages = 0;
    std::vector<wire::WireRun> suspects;
  };
  Barrier barrier(std::uint64_t tag) {
    Barrier result;
    if (!frame(wire::FrameType::kBarrier, 0, {}, tag)) return result;
    while (auto answer = receive()) {
      if (answer->header.type == static_cast<std::uint16_t>(wire::FrameType::kSuspects)) {
        const std::size_t count = answer->payload.size() / sizeof(wire::WireRun);
        const std::size_t before = result.suspects.size();
        result.suspects.resize(before + count);
        std::memcpy(result.suspects.data() + before, answer->payload.data(), answer->payload.size());
        continue;
      }
      // The last channel tells names whenever a page has been hashed.
      if (answer->header.type == static_cast<std::uint16_t>(wire::FrameType::kKnown)) continue;
      EXPECT_EQ(answer->header.type, static_cast<std::uint16_t>(wire::FrameType::kBarrierAck));
      EXPECT_EQ(answer->header.tag, tag);
      result.suspect_pages = answer->header.page_count;
      result.answered = true;
      return result;
    }
    return result;
  }
  bool switch_over() {
    if (!frame(wire::FrameType::kSwitch)) return false;
    const auto ack = receive();
    return ack && ack->header.type == static_cast<std::uint16_t>(wire::FrameType::kSwitchAck);
  }
  // The next request of the demand channel.
  std::optional<wire::FrameHeader> request() {
    const auto frame = receive();
    if (!frame) return std::nullopt;
    EXPECT_EQ(frame->header.type, static_cast<std::uint16_t>(wire::FrameType::kFaultRequest));
    return frame->header;
  }

 private:
  UniqueFd fd_;
};

// A receiver behind a listener, and the secrets to reach it.
struct Bench {
  static constexpr unsigned kEpochs = 6;

  explicit Bench(std::uint64_t pages, std::size_t regions_count = 1) : page_size(page_size_of()) {
    for (std::size_t i = 0; i < regions_count; ++i) regions.push_back(Region::allocate(pages * page_size));
    std::mt19937_64 random(42);
    for (auto& byte : config.migration) byte = static_cast<std::uint8_t>(random());
    config.channels = 2;
    config.tokens.resize(kEpochs * (config.channels + 1));
    for (auto& token : config.tokens) {
      for (auto& byte : token) byte = static_cast<std::uint8_t>(random());
    }
    config.regions = regions;
    config.recover_timeout = 15s;
    config.loss_grace = 10ms;
    config.on_event = log.callback();
  }
  ~Bench() {
    if (listener) listener->close();
    if (receiver) receiver->close();
  }
  static std::uint64_t page_size_of() { return static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE)); }

  void start() {
    receiver = Receiver::create(config);
    Listener::Config listening;
    listening.host = "127.0.0.1";
    listening.on_control = [this](UniqueFd fd, const std::string&) {
      const std::lock_guard lock(controls_mutex);
      controls.push_back(std::move(fd));
      controls_changed.notify_all();
    };
    listener = std::make_unique<Listener>(std::move(listening));
    listener->add(receiver);
  }
  wire::Hello hello(unsigned column, std::uint32_t epoch) const {
    wire::Hello hello{};
    hello.preface = wire::kDataPreface;
    hello.migration = config.migration;
    hello.version = wire::kVersion;
    hello.channel = column == config.channels ? wire::kDemandChannel : static_cast<std::uint16_t>(column);
    hello.epoch = epoch;
    hello.token = wire::data_token(config.tokens, config.channels + 1, column, epoch).value();
    return hello;
  }
  // nullopt: no answer. The connection is kept when `into` is given.
  std::optional<wire::HelloStatus> say(const wire::Hello& words,
                                       std::unique_ptr<Wire>* into = nullptr) const {
    auto wire = std::make_unique<Wire>(dial_loopback(listener->port()));
    wire::HelloReply reply{};
    if (!wire->raw(&words, sizeof words) || !wire->read(&reply, sizeof reply)) return std::nullopt;
    EXPECT_EQ(reply.magic, wire::kFrameMagic);
    if (into != nullptr) *into = std::move(wire);
    return static_cast<wire::HelloStatus>(reply.status);
  }
  void connect(std::uint32_t epoch = 0) {
    wires.clear();
    wires.resize(config.channels + 1);
    for (unsigned column = 0; column <= config.channels; ++column) {
      ASSERT_EQ(say(hello(column, epoch), &wires[column]), wire::HelloStatus::kAccepted);
    }
  }
  Wire& data(unsigned index) { return *wires[index]; }
  Wire& demand() { return *wires[config.channels]; }
  std::span<const std::byte> memory(std::size_t region = 0) const {
    return {regions[region]->address(PageNumber{0}).pointer(),
            static_cast<std::size_t>(regions[region]->bytes())};
  }
  std::byte* page(std::uint64_t number, std::size_t region = 0) const {
    return regions[region]->address(PageNumber{number}).pointer();
  }
  // Epoch > 0: what the destination says it has, page by page, of region 0.
  std::vector<bool> bitmap() {
    std::vector<bool> has(regions[0]->pages());
    while (auto frame = demand().receive()) {
      if (frame->header.type == static_cast<std::uint16_t>(wire::FrameType::kBitmapEnd)) return has;
      EXPECT_EQ(frame->header.type, static_cast<std::uint16_t>(wire::FrameType::kBitmap));
      if (frame->header.region != 0) continue;
      for (std::uint64_t i = 0; i < frame->header.page_count; ++i) {
        std::uint64_t word = 0;
        std::memcpy(&word, frame->payload.data() + i / 64 * 8, 8);
        has[frame->header.first_page + i] = ((word >> (i % 64)) & 1) != 0;
      }
    }
    ADD_FAILURE() << "the bitmap did not end";
    return has;
  }

  EventLog log;  // first: outlives the receiver
  std::uint64_t page_size;
  std::vector<std::shared_ptr<Region>> regions;
  ReceiverConfig config;
  std::shared_ptr<Receiver> receiver;
  std::unique_ptr<Listener> listener;
  std::vector<std::unique_ptr<Wire>> wires;
  std::mutex controls_mutex;
  std::condition_variable controls_changed;
  std::vector<UniqueFd> controls;
};

// What reading a byte through the kernel gives: nullopt when the access fails (poisoned). Blocks on a missing
// page until it is there.
inline std::optional<std::byte> try_read(const std::byte* address) {
  int pipe_fds[2];
  if (::pipe(pipe_fds) != 0) return std::nullopt;
  const UniqueFd read_end(pipe_fds[0]);
  const UniqueFd write_end(pipe_fds[1]);
  if (::write(write_end.get(), address, 1) != 1) return std::nullopt;
  std::byte value{};
  if (::read(read_end.get(), &value, 1) != 1) return std::nullopt;
  return value;
}

}  // namespace memferry::test
