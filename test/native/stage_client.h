// A VMD server over real loopback sockets and a scripted client of it, for tests: it says exactly what the test wants
// said, right or wrong, and keeps what came back. An oracle remembers every byte.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "fake_source.h"
#include "os/mapping.h"
#include "page/hash.h"
#include "stage/stage.h"
#include "transfer/listener.h"
#include "wire/codec.h"
#include "wire/frame.h"

namespace memferry::test {

inline ImageId image_id(std::uint8_t number) {
  ImageId id{};
  id.fill(number);
  id[0] = 0x1a;
  return id;
}

// Nobody else's, in this process or another: a port may be somebody else's a moment later, and who dials it still must
// not get in. The second byte is for telling guests apart.
inline ImageId own_image_id(std::uint8_t number) {
  static std::atomic<std::uint32_t> given{0};
  ImageId id = image_id(number);
  const std::array<std::uint32_t, 2> own{static_cast<std::uint32_t>(::getpid()), ++given};
  std::memcpy(&id[2], own.data(), sizeof own);
  return id;
}

// The tokens that everybody in a test computes alike: [attempt * kStageRoles + role].
inline wire::Token stage_token(const ImageId& image, std::uint16_t session, std::uint32_t attempt,
                               wire::StageRole role) {
  std::uint64_t state = std::uint64_t{image[1]} << 56 | std::uint64_t{session} << 40 |
                        std::uint64_t{attempt} << 8 | static_cast<std::uint64_t>(role);
  wire::Token token{};
  // Splitmix: a schedule of scatters needs thousands of them.
  for (std::size_t at = 0; at < token.size(); at += sizeof state) {
    state += 0x9e3779b97f4a7c15ULL;
    std::uint64_t word = (state ^ state >> 30) * 0xbf58476d1ce4e5b9ULL;
    word = (word ^ word >> 27) * 0x94d049bb133111ebULL;
    word ^= word >> 31;
    std::memcpy(&token[at], &word, sizeof word);
  }
  return token;
}
inline std::vector<wire::Token> stage_tokens(const ImageId& image, std::uint16_t session,
                                             std::uint32_t attempts = 16) {
  std::vector<wire::Token> tokens;
  for (std::uint32_t attempt = 0; attempt < attempts; ++attempt) {
    for (std::uint16_t role = 0; role < wire::kStageRoles; ++role) {
      tokens.push_back(stage_token(image, session, attempt, static_cast<wire::StageRole>(role)));
    }
  }
  return tokens;
}
inline std::vector<wire::Token> chain_tokens(const ImageId& image, std::uint8_t from,
                                             std::uint32_t attempts = 16) {
  std::vector<wire::Token> tokens;
  for (std::uint32_t attempt = 0; attempt < attempts; ++attempt) {
    tokens.push_back(stage_token(image, static_cast<std::uint16_t>(wire::kFirstChainSession + from), attempt,
                                 wire::StageRole::kChain));
  }
  return tokens;
}
inline unsigned role_bit(wire::StageRole role) { return 1U << static_cast<unsigned>(role); }

inline wire::Hello stage_hello(const ImageId& image, std::uint16_t session, wire::StageRole role,
                               std::uint32_t attempt) {
  wire::Hello hello{};
  hello.preface = wire::kStagePreface;
  hello.migration = image;
  hello.version = wire::kVersion;
  hello.channel = static_cast<std::uint16_t>(role);
  hello.epoch = std::uint32_t{session} << 16U | attempt;
  hello.token = stage_token(image, session, attempt, role);
  return hello;
}

// One connection about an image, as its client.
class StageClient {
 public:
  struct Frame {
    wire::FrameHeader header{};
    std::vector<std::byte> payload;
    [[nodiscard]] bool is(wire::FrameType type) const {
      return header.type == static_cast<std::uint16_t>(type);
    }
  };
  struct Refused {
    std::uint32_t region;
    std::uint64_t first;
    std::uint64_t count;
    bool operator==(const Refused&) const = default;
  };
  struct Barrier {
    bool acknowledged = false;
    std::vector<Refused> refused;
    std::size_t torn = 0;                 // of these
    std::optional<std::uint64_t> broken;  // the ordinal of a chain
  };
  struct Map {
    bool ended = false;
    bool sealed = false;
    std::vector<Frame> runs;
  };

  explicit StageClient(UniqueFd fd) : wire_(std::move(fd)) {}
  [[nodiscard]] Wire& wire() { return wire_; }
  [[nodiscard]] int fd() const { return wire_.fd(); }
  bool ended() { return wire_.ended(); }
  static std::uint64_t page_size() { return system_page_size(); }

  static wire::FrameHeader pages_header(std::uint32_t region, std::uint64_t first,
                                        std::span<const std::byte> bytes, wire::Holders holders) {
    wire::FrameHeader header = Wire::pages_header(region, first, bytes, page_size());
    header.tag = holders.tag();
    std::vector<std::uint64_t> hashes(bytes.size() / page_size());
    hash_pages(bytes, page_size(), hashes.data());
    wire::seal_pages(header, page_size(), hashes);
    return header;
  }
  // In frames of at most max_payload().
  bool pages(std::uint32_t region, std::uint64_t first, std::span<const std::byte> bytes,
             wire::Holders holders) {
    const std::uint64_t most = wire::max_payload(page_size());
    for (std::size_t at = 0; at < bytes.size(); at += most) {
      const auto part = bytes.subspan(at, std::min<std::size_t>(most, bytes.size() - at));
      const wire::FrameHeader header = pages_header(region, first + at / page_size(), part, holders);
      if (!wire_.raw(&header, sizeof header) || !wire_.raw(part.data(), part.size())) return false;
    }
    return true;
  }
  bool frame(wire::FrameHeader header, std::span<const std::byte> payload = {}) {
    wire::seal(header, payload);
    return wire_.raw(&header, sizeof header) && wire_.raw(payload.data(), payload.size());
  }
  bool zeros(std::uint32_t region, std::uint64_t first, std::uint64_t count, wire::Holders holders) {
    return frame(
        wire::make_header(wire::FrameType::kZero, region, {PageNumber{first}, count}, holders.tag()));
  }
  bool map(std::uint32_t region, std::uint64_t first, std::span<const std::uint64_t> hashes,
           wire::Holders holders, std::uint16_t flags = 0) {
    wire::FrameHeader header =
        wire::make_header(wire::FrameType::kMap, region, {PageNumber{first}, hashes.size()}, holders.tag());
    header.flags = flags;
    return frame(header, std::as_bytes(hashes));
  }
  bool map_bare(std::uint32_t region, std::uint64_t first, std::uint64_t count, wire::Holders holders,
                std::uint16_t flags) {
    wire::FrameHeader header =
        wire::make_header(wire::FrameType::kMap, region, {PageNumber{first}, count}, holders.tag());
    header.flags = flags;
    return frame(header);
  }
  bool ask_barrier(std::uint64_t tag) {
    return frame(wire::make_header(wire::FrameType::kBarrier, 0, {}, tag));
  }
  bool goodbye() { return frame(wire::make_header(wire::FrameType::kGoodbye)); }
  // What comes until the barrier's answer, or the end.
  Barrier await_barrier(std::uint64_t tag) {
    Barrier result;
    while (const auto answer = receive()) {
      const wire::FrameHeader& header = answer->header;
      if (answer->is(wire::FrameType::kRefused)) {
        result.refused.push_back({header.region, header.first_page, header.page_count});
        result.torn += (header.flags & wire::kFlagTorn) != 0 ? 1 : 0;
      } else if (answer->is(wire::FrameType::kChainBroken)) {
        result.broken = header.tag;
      } else {
        EXPECT_TRUE(answer->is(wire::FrameType::kBarrierAck)) << header.type;
        EXPECT_EQ(header.tag, tag);
        result.acknowledged = true;
        return result;
      }
    }
    return result;
  }
  Barrier barrier(std::uint64_t tag) {
    if (!ask_barrier(tag)) return {};
    return await_barrier(tag);
  }

  bool ask(std::uint32_t region, std::uint64_t first, std::uint64_t count, std::uint64_t tag) {
    return frame(wire::make_header(wire::FrameType::kRead, region, {PageNumber{first}, count}, tag));
  }
  // The frames that answer a read; they cover it in order, or the test has failed.
  std::vector<Frame> answer(std::uint32_t region, std::uint64_t first, std::uint64_t count,
                            std::uint64_t tag) {
    std::vector<Frame> frames;
    for (std::uint64_t at = first; at < first + count;) {
      auto next = receive();
      if (!next) {
        ADD_FAILURE() << "no answer to the read " << tag << " at page " << at;
        break;
      }
      EXPECT_EQ(next->header.region, region);
      EXPECT_EQ(next->header.first_page, at);
      EXPECT_EQ(next->header.tag, tag);
      EXPECT_TRUE(next->is(wire::FrameType::kPages) || next->is(wire::FrameType::kZero) ||
                  next->is(wire::FrameType::kAbsent));
      at += next->header.page_count;
      EXPECT_LE(at, first + count);
      if (next->header.page_count == 0 || HasFailureHere()) break;
      frames.push_back(std::move(*next));
    }
    return frames;
  }
  std::vector<Frame> read(std::uint32_t region, std::uint64_t first, std::uint64_t count,
                          std::uint64_t tag = 1) {
    if (!ask(region, first, count, tag)) return {};
    return answer(region, first, count, tag);
  }
  Map read_map() {
    Map map;
    if (!frame(wire::make_header(wire::FrameType::kMapRequest))) return map;
    while (auto next = receive()) {
      if (next->is(wire::FrameType::kMapEnd)) {
        map.ended = true;
        map.sealed = next->header.tag == 1;
        return map;
      }
      EXPECT_TRUE(next->is(wire::FrameType::kMap));
      map.runs.push_back(std::move(*next));
    }
    return map;
  }

  // The next frame, its checksum right; the payload is that of the decoded pages. Signs that the server is at it are
  // counted, and not given.
  std::optional<Frame> receive() {
    for (;;) {
      std::optional<Frame> frame = receive_any();
      if (!frame || !(frame->is(wire::FrameType::kTaken) || frame->is(wire::FrameType::kTurn))) return frame;
      ++signs;
      EXPECT_GE(frame->header.tag, worked);
      worked = frame->header.tag;
    }
  }
  unsigned signs = 0;
  std::uint64_t worked = 0;  // as the last one of them says
  // The same, whatever it is.
  std::optional<Frame> receive_any() {
    Frame frame;
    if (!wire_.read(&frame.header, sizeof frame.header)) return std::nullopt;
    const char* wrong = wire::malformed(frame.header, page_size());
    EXPECT_EQ(wrong, nullptr) << wrong;
    if (wrong != nullptr) return std::nullopt;
    frame.payload.resize(frame.header.payload_bytes);
    if (!wire_.read(frame.payload.data(), frame.payload.size())) return std::nullopt;
    if (const std::uint16_t encoding = wire::encoding_of(frame.header);
        frame.is(wire::FrameType::kPages) && encoding != 0) {
      std::vector<std::byte> pages(frame.header.page_count * page_size());
      wire::Decompressor decompressor;
      EXPECT_TRUE(decompressor.decompress(encoding, frame.payload, pages));
      frame.payload = std::move(pages);
    }
    if (frame.is(wire::FrameType::kPages)) {
      std::vector<std::uint64_t> hashes(frame.header.page_count);
      hash_pages(frame.payload, page_size(), hashes.data());
      EXPECT_EQ(frame.header.checksum, wire::pages_checksum(frame.header, hashes));
    } else {
      EXPECT_EQ(frame.header.checksum, wire::payload_checksum(frame.header, frame.payload));
    }
    return frame;
  }

 private:
  static bool HasFailureHere() { return ::testing::Test::HasFailure(); }
  Wire wire_;
};

// What an image holds, page by page.
class ImageOracle {
 public:
  explicit ImageOracle(std::vector<std::uint64_t> region_pages) {
    for (const std::uint64_t pages : region_pages) regions_.emplace_back(pages);
  }
  void content(std::uint32_t region, std::uint64_t first, std::span<const std::byte> bytes) {
    const std::size_t size = system_page_size();
    for (std::size_t i = 0; i < bytes.size() / size; ++i) {
      const auto page = bytes.subspan(i * size, size);
      regions_[region][first + i] = {Kind::kContent, {page.begin(), page.end()}};
    }
  }
  void zeros(std::uint32_t region, std::uint64_t first, std::uint64_t count) {
    fill(region, first, count, Kind::kZero);
  }
  void absent(std::uint32_t region, std::uint64_t first, std::uint64_t count) {
    fill(region, first, count, Kind::kAbsent);
  }
  [[nodiscard]] std::uint64_t held() const {
    std::uint64_t held = 0;
    for (const auto& region : regions_) {
      for (const Page& page : region) held += page.kind == Kind::kContent ? 1 : 0;
    }
    return held;
  }
  // Reads everything and compares each byte.
  void check(StageClient& client) const {
    const std::uint64_t most = wire::max_run_pages(system_page_size());
    for (std::uint32_t region = 0; region < regions_.size(); ++region) {
      const std::uint64_t pages = regions_[region].size();
      for (std::uint64_t first = 0; first < pages; first += most) {
        check(client, region, first, std::min(most, pages - first));
        if (::testing::Test::HasFailure()) return;
      }
    }
  }
  void check(StageClient& client, std::uint32_t region, std::uint64_t first, std::uint64_t count) const {
    const std::size_t size = system_page_size();
    for (const StageClient::Frame& frame : client.read(region, first, count, first + 7)) {
      for (std::uint64_t i = 0; i < frame.header.page_count; ++i) {
        const Page& page = regions_[region][frame.header.first_page + i];
        const bool right = frame.is(type_of(page.kind));
        ASSERT_TRUE(right) << "region " << region << " page " << frame.header.first_page + i
                           << " came as type " << frame.header.type;
        if (page.kind != Kind::kContent) continue;
        ASSERT_EQ(std::memcmp(frame.payload.data() + i * size, page.bytes.data(), size), 0)
            << "bytes of page " << frame.header.first_page + i;
      }
    }
  }

 private:
  enum class Kind { kAbsent, kZero, kContent };
  struct Page {
    Kind kind = Kind::kAbsent;
    std::vector<std::byte> bytes;
  };
  static wire::FrameType type_of(Kind kind) {
    return kind == Kind::kContent ? wire::FrameType::kPages
           : kind == Kind::kZero  ? wire::FrameType::kZero
                                  : wire::FrameType::kAbsent;
  }
  void fill(std::uint32_t region, std::uint64_t first, std::uint64_t count, Kind kind) {
    for (std::uint64_t i = 0; i < count; ++i) regions_[region][first + i] = {kind, {}};
  }
  std::vector<std::vector<Page>> regions_;
};

// A stage behind a listener.
struct StageBench {
  static constexpr std::uint16_t kSource = 1;       // session that may scatter
  static constexpr std::uint16_t kDestination = 2;  // session that may gather and demand

  explicit StageBench(std::uint64_t memory_bytes = 32ULL << 20, std::uint64_t bandwidth = 0)
      : StageBench(StageConfig{.memory_bytes = memory_bytes,
                               .bandwidth = bandwidth,
                               .chain_dial_timeout_ms = 20'000,
                               .chain_timeout_ms = 20'000}) {}
  explicit StageBench(StageConfig config) : stage(Stage::create(config)) {
    Listener::Config listening;
    listening.host = "127.0.0.1";
    listener = std::make_unique<Listener>(std::move(listening));
    listener->serve_stage(stage);
  }
  ~StageBench() {
    listener->close();
    stage->close();
  }
  // An image with its two sessions.
  void make(const ImageId& id, std::vector<std::uint64_t> region_pages, std::uint8_t ordinal = 0,
            const std::optional<DomainKey>& domain = std::nullopt) const {
    ASSERT_TRUE(stage->create_image({id, std::move(region_pages), ordinal, domain}));
    ASSERT_TRUE(stage->add_session(id, kSource,
                                   role_bit(wire::StageRole::kScatter) | role_bit(wire::StageRole::kProbe),
                                   stage_tokens(id, kSource)));
    ASSERT_TRUE(stage->add_session(id, kDestination,
                                   role_bit(wire::StageRole::kGather) | role_bit(wire::StageRole::kDemand),
                                   stage_tokens(id, kDestination)));
  }
  // nullopt: no answer.
  std::optional<wire::HelloStatus> say(const wire::Hello& hello,
                                       std::unique_ptr<StageClient>* into = nullptr) const {
    auto client = std::make_unique<StageClient>(dial_loopback(listener->port()));
    wire::HelloReply reply{};
    if (!client->wire().raw(&hello, sizeof hello) || !client->wire().read(&reply, sizeof reply))
      return std::nullopt;
    EXPECT_EQ(reply.magic, wire::kFrameMagic);
    if (into != nullptr) *into = std::move(client);
    return static_cast<wire::HelloStatus>(reply.status);
  }
  std::unique_ptr<StageClient> connect(const ImageId& id, std::uint16_t session, wire::StageRole role,
                                       std::uint32_t attempt = 0) const {
    std::unique_ptr<StageClient> client;
    EXPECT_EQ(say(stage_hello(id, session, role, attempt), &client), wire::HelloStatus::kAccepted);
    return client;
  }
  std::unique_ptr<StageClient> scatter(const ImageId& id, std::uint32_t attempt = 0) const {
    return connect(id, kSource, wire::StageRole::kScatter, attempt);
  }
  std::unique_ptr<StageClient> gather(const ImageId& id, std::uint32_t attempt = 0) const {
    return connect(id, kDestination, wire::StageRole::kGather, attempt);
  }
  std::unique_ptr<StageClient> demand(const ImageId& id, std::uint32_t attempt = 0) const {
    return connect(id, kDestination, wire::StageRole::kDemand, attempt);
  }

  std::shared_ptr<Stage> stage;
  std::unique_ptr<Listener> listener;
};

inline std::vector<std::byte> random_pages(std::uint64_t pages, std::uint64_t seed) {
  return random_bytes(static_cast<std::size_t>(pages * system_page_size()), seed);
}
inline std::vector<std::uint64_t> hashes_of(std::span<const std::byte> bytes) {
  std::vector<std::uint64_t> hashes(bytes.size() / system_page_size());
  hash_pages(bytes, system_page_size(), hashes.data());
  return hashes;
}

// This process's resident memory.
inline std::uint64_t resident_bytes() {
  FILE* file = std::fopen("/proc/self/statm", "r");
  unsigned long long size = 0;
  unsigned long long resident = 0;
  const int got = file == nullptr ? 0 : std::fscanf(file, "%llu %llu", &size, &resident);
  if (file != nullptr) std::fclose(file);
  EXPECT_EQ(got, 2);
  return resident * system_page_size();
}

}  // namespace memferry::test
