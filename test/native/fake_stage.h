// A VMD server for tests of the source: accepts scatter connections over real loopback sockets, checks every frame,
// keeps pages and map records in a plain model, and misbehaves as it is told. Replicas are a matter of the model
// alone: where it knows the others, whoever is named second is given a copy.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "page/hash.h"
#include "transfer/stage_server_address.h"
#include "wire/frame.h"
#include "wire/run_decoder.h"
#include "wire/socket.h"
#include "wire/stream.h"

namespace memferry::sender_test {

class FakeStage {
 public:
  struct Page {
    std::vector<std::byte> content;  // empty: zeros
    std::uint64_t hash = 0;
    std::map<std::uint32_t, std::uint64_t> chains_over;  // as they were when it came last
  };
  struct Record {
    wire::Holders holders;
    bool zero = false;
    std::uint64_t hash = 0;
  };
  using Key = std::pair<std::uint32_t, std::uint64_t>;

  FakeStage(unsigned ordinal, std::uint64_t page_size)
      : ordinal_(ordinal),
        page_size_(page_size),
        listening_(wire::listen_on(wire::SocketAddress::parse("127.0.0.1", 0))),
        port_(wire::SocketAddress::local(listening_.get()).port()),
        acceptor_([this] { accept(); }) {}
  ~FakeStage() {
    stopping_ = true;
    ::shutdown(listening_.get(), SHUT_RDWR);
    acceptor_.join();
    cut();
    {
      const std::lock_guard lock(mutex);
      stalled = false;
      stall_at = ~std::size_t{0};
      changed.notify_all();
    }
    for (auto& thread : threads_) thread.join();
  }

  StageServer address() const {
    StageServer server;
    server.name = "s" + std::to_string(ordinal_);
    server.host = "127.0.0.1";
    server.port = port_;
    server.session = 7;
    for (unsigned attempt = 0; attempt < 64; ++attempt) {
      for (unsigned role = 0; role < wire::kStageRoles; ++role) server.tokens.push_back(token(attempt, role));
    }
    return server;
  }
  static wire::Token token(unsigned attempt, unsigned role) {
    wire::Token token{};
    token[0] = static_cast<std::uint8_t>(attempt + 1);
    token[1] = static_cast<std::uint8_t>(role);
    return token;
  }

  void cut() {
    const std::lock_guard lock(mutex);
    for (auto& stream : streams_) stream->shutdown();
  }
  // What no server says.
  void say_garbage() {
    std::array<std::byte, sizeof(wire::FrameHeader)> garbage;
    garbage.fill(std::byte{0x5a});
    const std::lock_guard lock(mutex);
    for (auto& stream : streams_) (void)stream->send_all(std::span<const std::byte>(garbage));
  }
  void stall(bool now) {
    const std::lock_guard lock(mutex);
    stalled = now;
    changed.notify_all();
  }
  // Reads on and answers no barrier; false: answers those too that have come meanwhile.
  void hold_acks(bool now) {
    const std::lock_guard lock(mutex);
    holds_acks = now;
    if (now) return;
    for (wire::FrameHeader& answer : held_acks) {
      wire::seal(answer);
      for (auto& stream : streams_) (void)stream->send_all(std::as_bytes(std::span(&answer, 1)));
    }
    held_acks.clear();
  }
  template <typename Done>
  bool wait_for(Done done) {
    std::unique_lock lock(mutex);
    return changed.wait_for(lock, std::chrono::seconds(20), done);
  }

  std::atomic<bool> lost{false};           // answers hellos with kLost
  std::atomic<bool> refuse{false};         // closes at once
  std::atomic<std::uint64_t> room{~0ULL};  // pages
  std::atomic<bool> forget_acks{false};    // reads everything and answers no barrier
  std::atomic<bool> tears{false};          // finds nothing intact
  std::vector<FakeStage*> others;          // by ordinal; before anything is connected

  std::mutex mutex;  // guards the rest
  std::condition_variable changed;
  bool stalled = false;  // reads nothing
  std::map<Key, Page> pages;
  std::map<Key, Record> records;
  std::map<std::uint32_t, std::uint64_t> chains_over;  // by ordinal, the epoch
  bool holds_acks = false;                             // on one connection: see hold_acks()
  std::vector<wire::FrameHeader> held_acks;
  unsigned hellos = 0;
  unsigned deltas = 0;  // frames
  // With so many pages, at once: a test's thread may be late.
  std::size_t stall_at = ~std::size_t{0};
  std::size_t cut_at = ~std::size_t{0};  // once
  bool lost_when_cut = false;
  bool away_when_cut = false;  // `refuse` is set

 private:
  void accept() {
    for (;;) {
      UniqueFd fd(::accept4(listening_.get(), nullptr, nullptr, SOCK_CLOEXEC));
      if (stopping_) return;
      if (!fd) {
        // The listening socket does not block.
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
        continue;
      }
      if (refuse) {
        const std::lock_guard lock(mutex);
        ++hellos;
        continue;
      }
      auto stream = std::make_shared<wire::PlainStream>(std::move(fd));
      const std::lock_guard lock(mutex);
      streams_.push_back(stream);
      threads_.emplace_back([this, stream] { serve(*stream); });
    }
  }

  void serve(wire::PlainStream& stream) {
    wire::Hello hello{};
    if (!stream.recv_exact(std::as_writable_bytes(std::span(&hello, 1))).done()) return;
    EXPECT_EQ(hello.preface, wire::kStagePreface);
    EXPECT_EQ(hello.channel, 0u);
    EXPECT_EQ(hello.epoch >> 16, 7u);
    EXPECT_EQ(hello.token, token(hello.epoch & 0xffff, 0));
    const auto status = lost ? wire::HelloStatus::kLost : wire::HelloStatus::kAccepted;
    const wire::HelloReply reply{wire::kFrameMagic, static_cast<std::uint32_t>(status)};
    {
      const std::lock_guard lock(mutex);
      EXPECT_EQ(hello.epoch & 0xffff, hellos) << "an attempt that was used before";
      ++hellos;
      changed.notify_all();
    }
    (void)stream.send_all(std::as_bytes(std::span(&reply, 1)));
    if (lost) return stream.shutdown();
    std::vector<std::byte> payload;
    for (;;) {
      {
        std::unique_lock lock(mutex);
        changed.wait(lock, [this] { return !stalled; });
      }
      wire::FrameHeader header{};
      if (!stream.recv_exact(std::as_writable_bytes(std::span(&header, 1))).done()) return;
      const char* wrong = wire::malformed(header, page_size_);
      EXPECT_EQ(wrong, nullptr) << wrong;
      payload.resize(header.payload_bytes);
      if (!payload.empty() && !stream.recv_exact(payload).done()) return;
      if (!apply(stream, header, payload)) return;
    }
  }

  // With the mutex held. A delta's base are the pages as they are here; zeros where there is none.
  std::vector<std::byte> decode(const wire::FrameHeader& h, std::span<const std::byte> payload) {
    std::vector<std::byte> decoded(static_cast<std::size_t>(h.page_count * page_size_));
    if (wire::encoding_of(h) == wire::kFlagDelta) {
      for (std::uint64_t i = 0; i < h.page_count; ++i) {
        const auto found = pages.find({h.region, h.first_page + i});
        if (found == pages.end() || found->second.content.empty()) continue;
        std::memcpy(decoded.data() + i * page_size_, found->second.content.data(), page_size_);
      }
    }
    wire::RunDecoder decoder;
    EXPECT_TRUE(decoder.decode(wire::encoding_of(h), payload, decoded));
    return decoded;
  }

  bool apply(wire::PlainStream& stream, const wire::FrameHeader& h, std::span<const std::byte> payload) {
    std::vector<wire::FrameHeader> answers;
    std::map<Key, Page> passed_on;
    {
      const std::lock_guard lock(mutex);
      switch (static_cast<wire::FrameType>(h.type)) {
        case wire::FrameType::kPages:
        case wire::FrameType::kZero: {
          const bool content = !payload.empty();
          EXPECT_EQ(wire::Holders::of(h.tag).first, ordinal_);
          std::vector<std::uint64_t> hashes(content ? h.page_count : 0);
          std::vector<std::byte> decoded;
          if (content && wire::encoding_of(h) != 0) {
            if (wire::encoding_of(h) == wire::kFlagDelta) ++deltas;
            // What cannot be decoded has the wrong checksum too.
            decoded = decode(h, payload);
            payload = decoded;
          }
          if (content) {
            hash_pages(payload, page_size_, hashes.data());
            // Torn: the guest writes.
            if (tears || wire::pages_checksum(h, hashes) != h.checksum) {
              answers.push_back(wire::make_header(wire::FrameType::kRefused, h.region,
                                                  {PageNumber{h.first_page}, h.page_count}, ordinal_));
              answers.back().flags |= wire::kFlagTorn;
              break;
            }
          }
          if (pages.size() + h.page_count > room) {
            answers.push_back(wire::make_header(wire::FrameType::kRefused, h.region,
                                                {PageNumber{h.first_page}, h.page_count}, ordinal_));
            break;
          }
          for (std::uint64_t i = 0; i < h.page_count; ++i) {
            Page& page = pages[{h.region, h.first_page + i}];
            page.content.clear();
            page.chains_over = chains_over;
            page.hash = content ? hashes[i] : 0;
            if (content) {
              const auto bytes = payload.subspan(i * page_size_, page_size_);
              page.content.assign(bytes.begin(), bytes.end());
            }
            if (!others.empty()) passed_on[{h.region, h.first_page + i}] = page;
          }
          break;
        }
        case wire::FrameType::kMap:
          EXPECT_EQ(wire::payload_checksum(h, payload), h.checksum);
          for (std::uint64_t i = 0; i < h.page_count; ++i) {
            Record& record = records[{h.region, h.first_page + i}];
            record.holders = wire::Holders::of(h.tag);
            record.zero = (h.flags & wire::kFlagZero) != 0;
            if (!payload.empty()) std::memcpy(&record.hash, payload.data() + i * 8, 8);
          }
          break;
        case wire::FrameType::kChainOver:
          EXPECT_EQ(wire::payload_checksum(h, {}), h.checksum);
          chains_over[h.region] = h.tag;
          break;
        case wire::FrameType::kBarrier:
          if (forget_acks) break;
          (holds_acks ? held_acks : answers)
              .push_back(wire::make_header(wire::FrameType::kBarrierAck, 0, {}, h.tag));
          break;
        default:
          ADD_FAILURE() << "frame type " << h.type << " to a server";
      }
      if (pages.size() >= stall_at) stalled = true;
      if (pages.size() >= cut_at) {
        cut_at = ~std::size_t{0};
        if (lost_when_cut) lost = true;
        if (away_when_cut) refuse = true;
        for (auto& each : streams_) each->shutdown();
      }
      changed.notify_all();
    }
    const std::uint8_t second = wire::Holders::of(h.tag).second;
    if (!passed_on.empty() && second != wire::Holders::kNobody) {
      FakeStage& other = *others.at(second);
      const std::lock_guard lock(other.mutex);
      for (auto& [key, page] : passed_on) other.pages[key] = std::move(page);
    }
    for (wire::FrameHeader& answer : answers) {
      wire::seal(answer);
      if (!stream.send_all(std::as_bytes(std::span(&answer, 1))).done()) return false;
    }
    return true;
  }

  const unsigned ordinal_;
  const std::uint64_t page_size_;
  const UniqueFd listening_;
  const std::uint16_t port_;
  std::atomic<bool> stopping_{false};
  std::vector<std::shared_ptr<wire::PlainStream>> streams_;
  std::vector<std::thread> threads_;
  std::thread acceptor_;
};

}  // namespace memferry::sender_test
