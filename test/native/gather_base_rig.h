// A guest on VMD servers without any source, and a destination that has a file: what the tests of a gather with a base
// need. Also a server that answers wrongly what its pages are.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "accepting_server.h"
#include "scatter_rig.h"
#include "transfer/receiver.h"

namespace memferry::test {

// What a server does that is asked for hashes.
enum class Answer { kEnds, kWrong, kPages, kAbsent };

// Serves one region from memory.
class PlainServer {
 public:
  PlainServer(std::span<const std::byte> guest, Answer answer)
      : guest_(guest), answer_(answer), server_([this](Wire& wire) { serve(wire); }) {}
  [[nodiscard]] std::uint16_t port() const { return server_.port(); }

 private:
  void serve(Wire& wire) const {
    while (const auto asked = wire.receive()) {
      if (!answer(wire, asked->header)) return;
    }
  }
  bool answer(Wire& wire, const wire::FrameHeader& asked) const {
    const PageRun run{PageNumber{asked.first_page}, asked.page_count};
    const std::uint64_t page_size = system_page_size();
    const auto bytes = guest_.subspan(run.first.value * page_size, run.count * page_size);
    switch (static_cast<wire::FrameType>(asked.type)) {
      case wire::FrameType::kMapRequest: {
        const auto hashes = hashes_of(guest_);
        const wire::Holders holders{0, wire::Holders::kNobody};
        return wire.frame(wire::FrameType::kMap, 0, {PageNumber{0}, hashes.size()}, holders.tag(),
                          std::as_bytes(std::span(hashes))) &&
               wire.frame(wire::FrameType::kMapEnd, 0, {}, 1);
      }
      case wire::FrameType::kRead:
        return send_pages(wire, asked, bytes);
      case wire::FrameType::kHashRequest: {
        if (answer_ == Answer::kEnds) return false;
        if (answer_ == Answer::kPages) return send_pages(wire, asked, bytes);
        if (answer_ == Answer::kAbsent) return wire.frame(wire::FrameType::kAbsent, 0, run, asked.tag);
        const std::vector<wire::TreeHash> hashes(run.count);
        return wire.frame(wire::FrameType::kHashes, 0, run, asked.tag, std::as_bytes(std::span(hashes)));
      }
      default:
        return false;
    }
  }
  static bool send_pages(Wire& wire, const wire::FrameHeader& asked, std::span<const std::byte> bytes) {
    wire::FrameHeader header = Wire::pages_header(0, asked.first_page, bytes, system_page_size());
    header.tag = asked.tag;
    wire::seal_pages(header, system_page_size(), hashes_of(bytes));
    return wire.raw(&header, sizeof header) && wire.raw(bytes.data(), bytes.size());
  }

  const std::span<const std::byte> guest_;
  const Answer answer_;
  const AcceptingServer server_;
};

class GatherBaseRig : public testing::Test {
 protected:
  static std::uint64_t page_size() { return system_page_size(); }

  // Every 32nd page is zeros.
  void make(std::uint64_t pages, unsigned servers, bool replicas = false) {
    make_guest(pages);
    replicas_ = replicas;
    for (unsigned i = 0; i < servers; ++i) vmd.push_back(Vmd::start(128ULL << 20));
    for (const Vmd& each : vmd) ports.push_back(each.listener->port());
    for (unsigned i = 0; i < servers; ++i) {
      ASSERT_TRUE(give_image(*vmd[i].stage, image, {pages}, static_cast<std::uint8_t>(i), ports));
    }
  }
  void make_fake(std::uint64_t pages, Answer answer) {
    make_guest(pages);
    fake = std::make_unique<PlainServer>(guest, answer);
    ports = {fake->port()};
  }
  // Behind this `guest` is not changed any more.
  ReceiverConfig config_of(BaseImage base) {
    ReceiverConfig config;
    config.regions = {target};
    config.migration = image;
    config.channels = 1;
    config.tokens = direct_tokens(1);
    config.may_page = true;
    config.keep_page_hashes = true;
    config.loss_grace = std::chrono::milliseconds(50);
    config.servers = server_addresses(image, kDestinationSession, ports);
    config.sourceless = true;
    config.base_images = {std::move(base)};
    config.on_event = arrivals.callback();
    return config;
  }
  void gather(BaseImage base, std::uint64_t limit = 0,
              std::chrono::milliseconds recover = std::chrono::milliseconds(5000)) {
    if (!fake) put();
    ReceiverConfig config = config_of(std::move(base));
    config.gather_limit = limit;
    config.recover_timeout = recover;
    receiver = Receiver::create(std::move(config));
  }
  BaseImage file_of(std::span<const std::byte> bytes) {
    std::string path = testing::TempDir() + "memferry-base-XXXXXX";
    const int fd = ::mkstemp(path.data());
    EXPECT_GE(fd, 0);
    ::close(fd);
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    files_.push_back(path);
    return {.path = path, .offset_bytes = 0};
  }
  // A byte of every n-th page; gives how many of these are content.
  std::uint64_t change(std::vector<std::byte>& bytes, std::uint64_t every) const {
    std::uint64_t changed = 0;
    for (std::uint64_t page = 0; page < pages_; page += every) {
      bytes[page * page_size() + 77] ^= std::byte{1};
      changed += zero(page) ? 0 : 1;
    }
    return changed;
  }
  [[nodiscard]] static bool zero(std::uint64_t page) { return page % 32 == 5; }
  [[nodiscard]] std::uint64_t content_pages(std::uint64_t of_the_first = ~0ULL) const {
    std::uint64_t content = 0;
    for (std::uint64_t page = 0; page < std::min(pages_, of_the_first); ++page) content += zero(page) ? 0 : 1;
    return content;
  }
  [[nodiscard]] bool right(std::uint64_t page) const {
    return std::memcmp(target->address(PageNumber{page}).pointer(), guest.data() + page * page_size(),
                       page_size()) == 0;
  }
  void expect_right() const {
    for (std::uint64_t page = 0; page < pages_; ++page) ASSERT_TRUE(right(page)) << "page " << page;
    const auto hashes = hashes_of(guest);
    EXPECT_EQ(receiver->digest(0), xxh3_128(std::as_bytes(std::span(hashes))));
  }
  // Two pages with one XXH3. A lane of a stripe adds its word to its neighbour's sum, and the product of both halves of
  // the word XOR its part of the secret to its own: nothing, where the low halves are the same.
  static std::pair<std::vector<std::byte>, std::vector<std::byte>> same_xxh3() {
    auto one = random_pages(1, 8);
    auto other = one;
    constexpr std::size_t kStripe = 64;
    for (std::size_t stripe = 0; stripe < 2; ++stripe) {
      std::uint64_t secret = 0;
      std::memcpy(&secret, XXH3_kSecret + 8 * stripe, sizeof secret);
      const auto put = [&](std::vector<std::byte>& page, std::uint64_t high) {
        const std::uint64_t word = high << 32 | (secret & 0xffffffff);
        std::memcpy(page.data() + stripe * kStripe, &word, sizeof word);
      };
      put(one, stripe == 0 ? 1000 : 2000);
      put(other, stripe == 0 ? 1001 : 1999);
    }
    return {one, other};
  }
  void end() {
    if (receiver) receiver->close();
    receiver.reset();
    for (const Vmd& each : vmd) each.end();
    vmd.clear();
    ports.clear();
    fake.reset();
  }
  void TearDown() override {
    end();
    for (const std::string& path : files_) ::unlink(path.c_str());
  }

  ImageId image{};
  std::vector<std::byte> guest;
  std::shared_ptr<Region> target;
  std::vector<Vmd> vmd;
  std::vector<std::uint16_t> ports;
  std::unique_ptr<PlainServer> fake;
  EventBox arrivals;
  std::shared_ptr<Receiver> receiver;

 private:
  void make_guest(std::uint64_t pages) {
    pages_ = pages;
    image = own_image_id(0x52);
    guest = random_pages(pages, 6);
    for (std::uint64_t page = 5; page < pages; page += 32)
      std::fill_n(guest.begin() + static_cast<std::ptrdiff_t>(page * page_size()), page_size(), std::byte{});
    target = Region::allocate(pages * page_size());
  }
  // Runs of 48 pages by turns; each server has the whole map, as after a park.
  void put() {
    constexpr std::uint64_t kRun = 48;
    std::vector<std::unique_ptr<StageClient>> clients;
    for (unsigned i = 0; i < vmd.size(); ++i) {
      const wire::Hello hello = stage_hello(image, kSourceSession, wire::StageRole::kScatter, 0);
      wire::HelloReply reply{};
      clients.push_back(std::make_unique<StageClient>(dial_loopback(ports[i])));
      ASSERT_TRUE(clients[i]->wire().raw(&hello, sizeof hello));
      ASSERT_TRUE(clients[i]->wire().read(&reply, sizeof reply));
      ASSERT_EQ(reply.status, static_cast<std::uint32_t>(wire::HelloStatus::kAccepted));
    }
    const auto hashes = hashes_of(guest);
    for (std::uint64_t page = 0; page < pages_;) {
      const bool zeros = zero(page);
      std::uint64_t end = page + 1;
      while (end < pages_ && end % kRun != 0 && zero(end) == zeros) ++end;
      const auto at = static_cast<std::uint8_t>(page / kRun % vmd.size());
      const auto other = static_cast<std::uint8_t>((at + 1) % vmd.size());
      const wire::Holders holders{at, replicas_ ? other : wire::Holders::kNobody};
      const auto bytes =
          std::span<const std::byte>(guest).subspan(page * page_size(), (end - page) * page_size());
      for (unsigned i = 0; i < vmd.size(); ++i) {
        const PageRun run{PageNumber{page}, end - page};
        const auto of_run = std::span(hashes).subspan(page, run.count);
        if (zeros) {
          ASSERT_TRUE(clients[i]->map_bare(0, page, run.count, holders, wire::kFlagZero));
        } else if (i == at) {
          ASSERT_TRUE(clients[i]->pages(0, page, bytes, holders));
        } else if (!holders.has(static_cast<std::uint8_t>(i))) {
          ASSERT_TRUE(clients[i]->map(0, page, of_run, holders));
        }
      }
      page = end;
    }
    for (const auto& client : clients) ASSERT_TRUE(client->barrier(1).acknowledged);
  }

  std::uint64_t pages_ = 0;
  bool replicas_ = false;
  std::vector<std::string> files_;
};

}  // namespace memferry::test
