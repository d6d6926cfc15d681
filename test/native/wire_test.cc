// Frames, addresses, dialling and streams over real loopback sockets.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

#include "page/hash.h"
#include "wire/frame.h"
#include "wire/socket.h"
#include "wire/stream.h"

namespace memferry::wire {
namespace {

using namespace std::chrono_literals;

constexpr std::uint64_t kPage = 4096;

std::uint64_t naive_checksum(const FrameHeader& header, const void* rest, std::size_t bytes) {
  std::vector<std::byte> joined(40 + bytes);
  std::memcpy(joined.data(), &header, 40);
  if (bytes > 0) std::memcpy(joined.data() + 40, rest, bytes);
  return xxh3_64(joined);
}

TEST(Frame, ChecksumIsOneHashOverHeaderAndHashesWhateverTheirNumber) {
  for (std::size_t pages : {1u, 2u, 63u, 64u, 65u, 200u}) {
    std::vector<std::uint64_t> hashes(pages);
    for (std::size_t i = 0; i < pages; ++i) hashes[i] = i * 0x9e3779b97f4a7c15ULL;
    FrameHeader header = make_header(FrameType::kPages, 3, PageRun{PageNumber{7}, pages}, 9);
    seal_pages(header, kPage, hashes);
    EXPECT_EQ(header.payload_bytes, pages * kPage);
    EXPECT_EQ(header.checksum, naive_checksum(header, hashes.data(), hashes.size() * 8)) << pages;
    EXPECT_EQ(header.checksum, pages_checksum(header, hashes));
    header.first_page ^= 1;
    EXPECT_NE(header.checksum, pages_checksum(header, hashes));
  }
}

TEST(Frame, SealCoversThePayload) {
  std::vector<std::byte> payload(5000, std::byte{5});
  FrameHeader header = make_header(FrameType::kBitmap);
  seal(header, payload);
  EXPECT_EQ(header.checksum, naive_checksum(header, payload.data(), payload.size()));
  EXPECT_EQ(header.checksum, payload_checksum(header, payload));
  payload[4999] = std::byte{6};
  EXPECT_NE(header.checksum, payload_checksum(header, payload));
}

TEST(Frame, MalformedHeadersAreNamed) {
  FrameHeader good = make_header(FrameType::kPages, 0, PageRun{PageNumber{0}, 2});
  good.payload_bytes = 2 * kPage;
  EXPECT_EQ(malformed(good, kPage), nullptr);
  const auto bad = [&](auto change) {
    FrameHeader header = good;
    change(header);
    return malformed(header, kPage) != nullptr;
  };
  EXPECT_TRUE(bad([](FrameHeader& h) { h.magic ^= 1; }));
  EXPECT_TRUE(bad([](FrameHeader& h) { h.type = 0; }));
  EXPECT_TRUE(bad([](FrameHeader& h) { h.type = 13; }));
  EXPECT_TRUE(bad([](FrameHeader& h) { h.payload_bytes -= 1; }));
  EXPECT_TRUE(bad([](FrameHeader& h) {
    h.page_count = 0;
    h.payload_bytes = 0;
  }));
  EXPECT_TRUE(bad([](FrameHeader& h) {
    h.page_count = 65;
    h.payload_bytes = 65 * kPage;
  }));
  EXPECT_TRUE(bad([](FrameHeader& h) { h.payload_bytes = 0xffffffffU; }));
  // page_count * page_size overflows to the payload's length
  EXPECT_TRUE(bad([](FrameHeader& h) { h.page_count = (1ULL << 52) + 2; }));
  EXPECT_TRUE(bad([](FrameHeader& h) { h.type = 2; }));  // zero pages with payload
  EXPECT_TRUE(bad([](FrameHeader& h) {
    h.type = 3;
    h.payload_bytes = 17;
  }));  // not whole runs
  EXPECT_TRUE(bad([](FrameHeader& h) {
    h.type = 10;
    h.first_page = 1;
  }));                                                    // not a whole word
  EXPECT_TRUE(bad([](FrameHeader& h) { h.type = 12; }));  // goodbye with payload
}

TEST(Frame, OnePageMayBeLargerThanARun) {
  constexpr std::uint64_t kHuge = 2 * 1024 * 1024;
  FrameHeader header = make_header(FrameType::kPages, 0, PageRun{PageNumber{0}, 1});
  header.payload_bytes = kHuge;
  EXPECT_EQ(malformed(header, kHuge), nullptr);
  header.page_count = 2;
  EXPECT_NE(malformed(header, kHuge), nullptr);
}

TEST(Frame, RunInsideSurvivesOverflow) {
  EXPECT_TRUE(run_inside(0, 10, 10));
  EXPECT_TRUE(run_inside(9, 1, 10));
  EXPECT_FALSE(run_inside(9, 2, 10));
  EXPECT_FALSE(run_inside(10, 1, 10));
  EXPECT_FALSE(run_inside(3, 0, 10));
  EXPECT_FALSE(run_inside(1, ~0ULL, 10));
  EXPECT_FALSE(run_inside(~0ULL, 1, 10));
}

TEST(SocketAddress, ParsesNumericAddressesOnly) {
  EXPECT_EQ(SocketAddress::parse("127.0.0.1", 80).describe(), "127.0.0.1:80");
  EXPECT_EQ(SocketAddress::parse("::1", 80).describe(), "[::1]:80");
  EXPECT_TRUE(SocketAddress::parse("127.1.2.3", 1).loopback());
  EXPECT_TRUE(SocketAddress::parse("::1", 1).loopback());
  EXPECT_TRUE(SocketAddress::parse("::ffff:127.0.0.1", 1).loopback());
  EXPECT_FALSE(SocketAddress::parse("10.0.0.1", 1).loopback());
  for (const char* wrong : {"localhost", "", "1.2.3", "1.2.3.4.5", "::1%nosuchif", "[::1]"}) {
    EXPECT_THROW(SocketAddress::parse(wrong, 1), std::invalid_argument) << wrong;
  }
}

struct Pair {
  std::unique_ptr<PlainStream> dialled;
  std::unique_ptr<PlainStream> accepted;
};

UniqueFd accept_one(int listening) {
  pollfd polled{listening, POLLIN, 0};
  EXPECT_EQ(::poll(&polled, 1, 5000), 1);
  return UniqueFd(::accept4(listening, nullptr, nullptr, SOCK_CLOEXEC));
}

Pair connected_pair() {
  const UniqueFd listening = listen_on(SocketAddress::parse("127.0.0.1", 0));
  DialResult result = dial(SocketAddress::local(listening.get()), 5s, -1);
  EXPECT_EQ(result.kind, DialResult::Kind::kConnected);
  EXPECT_TRUE(is_same_host(result.fd.get()));
  std::array<char, 16> control{};
  socklen_t bytes = control.size();
  EXPECT_EQ(::getsockopt(result.fd.get(), IPPROTO_TCP, TCP_CONGESTION, control.data(), &bytes), 0);
  EXPECT_STREQ(control.data(), "reno");  // not the system's, which may pace
  return {std::make_unique<PlainStream>(std::move(result.fd)),
          std::make_unique<PlainStream>(accept_one(listening.get()))};
}

TEST(Dial, NobodyThere) {
  UniqueFd listening = listen_on(SocketAddress::parse("127.0.0.1", 0));
  const SocketAddress address = SocketAddress::local(listening.get());
  listening.reset();
  const DialResult result = dial(address, 5s, -1);
  EXPECT_EQ(result.kind, DialResult::Kind::kFailed);
  EXPECT_EQ(result.error, ECONNREFUSED);
}

// A listener whose backlog is full swallows the SYN: the dial hangs until its timeout or its cancellation.
class SilentListener : public testing::Test {
 protected:
  void SetUp() override {
    listening_ = listen_on(SocketAddress::parse("127.0.0.1", 0), 0);
    address_ = SocketAddress::local(listening_.get());
    for (int i = 0; i < 4; ++i) {
      fillers_.emplace_back(::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
      (void)::connect(fillers_.back().get(), address_.get(), address_.bytes());
    }
  }
  UniqueFd listening_;
  SocketAddress address_;
  std::vector<UniqueFd> fillers_;
};

TEST_F(SilentListener, DialTimesOut) {
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_EQ(dial(address_, 100ms, -1).kind, DialResult::Kind::kTimedOut);
  EXPECT_GE(std::chrono::steady_clock::now() - begin, 100ms);
}

TEST_F(SilentListener, DialIsCancelled) {
  const UniqueFd cancel(::eventfd(0, EFD_CLOEXEC));
  std::jthread canceller([&] { ::eventfd_write(cancel.get(), 1); });
  EXPECT_EQ(dial(address_, 60s, cancel.get()).kind, DialResult::Kind::kCancelled);
}

TEST(Stream, ManyBuffersLargerThanTheSocketArriveInOrder) {
  Pair pair = connected_pair();
  std::vector<std::byte> sent(16 << 20);
  for (std::size_t i = 0; i < sent.size(); ++i) sent[i] = static_cast<std::byte>(i * 31 >> 3);
  std::vector<std::byte> received(sent.size());
  std::jthread reader([&] { EXPECT_TRUE(pair.accepted->recv_exact(received).done()); });
  std::vector<iovec> buffers;  // more than IOV_MAX of them, empty ones among them
  for (std::size_t at = 0; at < sent.size(); at += 4096) {
    buffers.push_back({sent.data() + at, 4096});
    buffers.push_back({nullptr, 0});
  }
  EXPECT_TRUE(pair.dialled->send_all(buffers).done());
  reader.join();
  EXPECT_EQ(sent, received);
}

TEST(Stream, EndInOrderIsNotACut) {
  Pair pair = connected_pair();
  std::array<std::byte, 8> buffer{};
  ASSERT_TRUE(pair.dialled->send_all(std::span<const std::byte>(buffer)).done());
  pair.dialled->shutdown();
  EXPECT_TRUE(pair.accepted->recv_exact(buffer).done());
  EXPECT_EQ(pair.accepted->recv_exact(buffer).kind, IoResult::Kind::kEnd);
}

TEST(Stream, EndInTheMiddleIsACut) {
  Pair pair = connected_pair();
  std::array<std::byte, 8> buffer{};
  ASSERT_TRUE(pair.dialled->send_all(std::span<const std::byte>(buffer).first(3)).done());
  pair.dialled->shutdown();
  EXPECT_EQ(pair.accepted->recv_exact(buffer).kind, IoResult::Kind::kCut);
}

TEST(Stream, ShutdownWakesABlockedReaderAndABlockedWriter) {
  Pair pair = connected_pair();
  std::array<std::byte, 8> small{};
  const std::vector<std::byte> large(64 << 20);  // more than any socket buffer: blocks, since nobody reads
  IoResult read;
  IoResult written;
  std::jthread reader([&] { read = pair.dialled->recv_exact(small); });
  std::jthread writer([&] { written = pair.dialled->send_all(std::span<const std::byte>(large)); });
  pair.dialled->shutdown();
  reader.join();
  writer.join();
  EXPECT_FALSE(read.done());
  EXPECT_FALSE(written.done());
}

TEST(Stream, WritingToAClosedPeerIsACutAndNoSignal) {
  Pair pair = connected_pair();
  pair.accepted.reset();
  const std::vector<std::byte> bytes(1 << 20);
  IoResult result;
  for (int i = 0; i < 100 && result.done(); ++i) result = pair.dialled->send_all(std::span(bytes));
  EXPECT_EQ(result.kind, IoResult::Kind::kCut);
}

}  // namespace
}  // namespace memferry::wire
