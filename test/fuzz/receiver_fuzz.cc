// The connections of a source to a destination's engine as a whole, behind right hellos: in every state in which it may be.
// One connection speaks at a time, and is heard to its last frame before the next one does.
//
// Input: u8 how, then parts: u8 whose (a channel, or the owner), u8 how many frames, frames (frame_script.h).
#include <cstdio>
#include <memory>
#include <vector>

#include "frame_script.h"
#include "loopback.h"
#include "os/userfaultfd.h"
#include "page/region.h"
#include "transfer/known_pages.h"
#include "transfer/receiver.h"

namespace memferry::fuzz {
namespace {

using wire::FrameType;

enum How : std::uint8_t {
  kMayPage = 1,
  kFromStart = 2,
  kBase = 4,
  kBaseInPlace = 8,
  kReferences = 16,
  kDigests = 32,
  kTwoExtents = 64,
};
constexpr unsigned kChannels = 2;
constexpr unsigned kColumns = kChannels + 1;
constexpr std::uint32_t kEpochs = 3;
constexpr std::uint64_t kPages = 40;
constexpr std::size_t kMostParts = 12;
constexpr std::size_t kMostFrames = 24;
constexpr std::byte kCanary{0xc5};

// A region of one or two extents, with pages before, between and behind that are nobody's to touch.
class Memory {
 public:
  explicit Memory(bool two) : mapping_(Mapping::anonymous((kPages + 3) * page())) {
    const std::uint64_t first = two ? kPages / 2 : kPages;
    std::vector<Extent> extents = {{mapping_.start().plus(page()), first * page()}};
    canaries_ = {0, first + 1, kPages + 2};
    if (two) extents.push_back({mapping_.start().plus((first + 2) * page()), (kPages - first) * page()});
    for (const std::uint64_t canary : canaries_)
      std::fill_n(mapping_.data() + canary * page(), page(), kCanary);
    region = Region::adopt(extents, extents.back().bytes);
  }
  ~Memory() {
    for (const std::uint64_t canary : canaries_) {
      const auto bytes = mapping_.bytes().subspan(canary * page(), page());
      require(std::all_of(bytes.begin(), bytes.end(), [](std::byte each) { return each == kCanary; }));
    }
    region->retire();
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  [[nodiscard]] std::span<const std::byte> bytes_of(std::uint64_t number) const {
    return region->contiguous({PageNumber{number}, 1});
  }
  static std::uint64_t page() { return system_page_size(); }

  std::shared_ptr<Region> region;

 private:
  Mapping mapping_;
  std::vector<std::uint64_t> canaries_;
};

// Where nobody may have one nothing is paged, and that is said once.
bool userfaultfd_there() {
  static const bool there = [] {
    try {
      (void)Userfaultfd::open(0, false);
      return true;
    } catch (const SystemError& error) {
      std::fprintf(stderr, "receiver: paging is not fuzzed, there is no userfaultfd here: %s\n",
                   error.what());
      return false;
    }
  }();
  return there;
}

class World {
 public:
  explicit World(std::uint8_t how) : how_(how), memory_((how & kTwoExtents) != 0), named_(kPages) {
    ReceiverConfig config;
    config.regions = {memory_.region};
    config.migration = id();
    config.channels = kChannels;
    for (std::uint8_t i = 0; i < kEpochs * kColumns; ++i) config.tokens.push_back(token(i));
    config.may_page = (how & kMayPage) != 0;
    config.paging_from_start = (how & kFromStart) != 0;
    config.keep_page_hashes = (how & kDigests) != 0;
    config.loss_grace = std::chrono::milliseconds(1);
    config.encodings = wire::kEncodings;
    if ((how & kBase) != 0 && !config.paging_from_start) {
      config.bases = {(how & kBaseInPlace) != 0 ? ReceiverConfig::Base::kInPlace
                                                : ReceiverConfig::Base::kGiven};
      config.discard_first = (how & kBaseInPlace) == 0;
    }
    if ((how & kReferences) != 0) config.known = KnownPages::of_domain(ContentKey{1}, "");
    config.on_event = [](const EngineEvent&) {};
    receiver_ = Receiver::create(std::move(config));
    for (unsigned column = 0; column < kColumns; ++column) connect(column);
  }

  ~World() {
    (void)receiver_->seal();
    const bool filling = !receiver_->paging();
    const ReceiverStats stats = receiver_->stats();
    require(stats.pages_missing <= kPages && stats.pages_suspect <= kPages);
    if ((how_ & kDigests) != 0) (void)receiver_->digest(0);
    peers_.clear();
    receiver_->close();
    // While paging what is missing fails to be read by now.
    if (filling && !switched_ && (how_ & (kFromStart | kReferences)) == 0) check_untouched();
  }
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  void part(Input& input) {
    const std::uint8_t choice = input.byte();
    const std::uint8_t whose = choice % 8;
    std::vector<FrameScript::Frame> frames;
    bool cut = false;
    for (std::size_t left = input.byte() % (kMostFrames + 1); left > 0 && !input.empty() && !cut; --left) {
      frames.push_back(script_.next(input));
      note(frames.back().header);
      cut = frames.back().cut;
    }
    if (whose < kColumns) {
      talk(whose, frames, cut);
    } else if (whose == kColumns) {
      redial();
    } else if (whose == kColumns + 1) {
      receiver_->base_sampled(choice < 128);
    } else if (whose == kColumns + 2) {
      receiver_->base_ready();
    } else {
      receiver_->await_filled();
      (void)receiver_->ready();
      require(receiver_->missing(1000).size() <= kPages);
    }
  }

 private:
  static const Loopback& clients() {
    static const Loopback listening;
    return listening;
  }
  static wire::MigrationId id() { return {5}; }
  static wire::Token token(std::uint8_t number) {
    wire::Token token{};
    token.fill(static_cast<std::uint8_t>(number + 1));
    return token;
  }

  bool connect(unsigned column) {
    auto [theirs, ours] = clients().connected();
    wire::Hello hello{};
    hello.preface = wire::kDataPreface;
    hello.migration = id();
    hello.version = wire::kVersion;
    hello.channel = column == kChannels ? wire::kDemandChannel : static_cast<std::uint16_t>(column);
    hello.epoch = epoch_;
    hello.token = token(static_cast<std::uint8_t>(epoch_ * kColumns + column));
    if (!receiver_->attach(hello, theirs)) return false;
    peers_.resize(kColumns);
    answers_.resize(kColumns);
    answers_[column] = FrameSplitter();
    peers_[column] = std::make_unique<Peer>(std::move(ours));
    Peer& peer = *peers_[column];
    wire::HelloReply reply{};
    // Before anything else it says yes.
    serve(
        {&peer}, -1, [&] { return peer.waiting_bytes() >= sizeof reply || peer.ended(); }, [](auto&) {});
    require(peer.read_struct(reply) && reply.magic == wire::kFrameMagic && reply.status == 1);
    return true;
  }

  void redial() {
    if (epoch_ + 1 >= kEpochs) return;
    ++epoch_;
    if (!connect(kChannels)) {
      --epoch_;
      return;
    }
    for (unsigned column = 0; column < kChannels; ++column) (void)connect(column);
  }

  // What is behind the barrier was heard, or the connection has ended.
  void talk(unsigned column, const std::vector<FrameScript::Frame>& frames, bool cut) {
    if (column >= peers_.size() || !peers_[column]) return;
    Peer& peer = *peers_[column];
    for (const auto& frame : frames) peer.write(frame.bytes);
    wire::FrameHeader barrier = wire::make_header(FrameType::kBarrier, 0, {}, ++barriers_ << 20U);
    wire::seal(barrier);
    if (cut) {
      peer.finish();
    } else {
      peer.write_struct(barrier);
    }
    bool heard = false;
    serve(
        {&peer}, -1, [&] { return (heard = check_answers(column, barrier.tag) || heard) || peer.ended(); },
        [](auto&) {});
    (void)check_answers(column, barrier.tag);
    if (peer.ended()) peers_[column].reset();
  }

  // True: the barrier's was among them.
  bool check_answers(unsigned column, std::uint64_t tag) {
    answers_[column].add(peers_[column]->received());
    bool heard = false;
    for (FrameSplitter::Frame answer; answers_[column].next(answer);) {
      const wire::FrameHeader& header = answer.header;
      switch (static_cast<FrameType>(header.type)) {
        case FrameType::kBarrierAck:
          heard = heard || header.tag == tag;
          break;
        case FrameType::kSwitchAck:
        case FrameType::kBitmapEnd:
        case FrameType::kTaken:
          break;
        case FrameType::kSuspects:
          for (std::size_t at = 0; at < answer.payload.size(); at += sizeof(wire::WireRun)) {
            wire::WireRun run{};
            std::memcpy(&run, &answer.payload[at], sizeof run);
            require(wire::run_inside(run.first_page, run.page_count, kPages));
          }
          break;
        case FrameType::kFaultRequest:
        case FrameType::kBitmap:
        case FrameType::kTree:
        case FrameType::kUnresolved:
          require(header.region == 0 && wire::run_inside(header.first_page, header.page_count, kPages));
          break;
        case FrameType::kKnown:
          break;
        default:
          require(false);
      }
    }
    return heard;
  }

  void note(const wire::FrameHeader& header) {
    if (header.type == static_cast<std::uint16_t>(FrameType::kSwitch)) switched_ = true;
    if (header.region != 0) return;
    for (std::uint64_t page = header.first_page;
         page < kPages && page - header.first_page < header.page_count; ++page) {
      named_[page] = true;
    }
  }

  // Of pages that no frame was about nothing has come.
  void check_untouched() const {
    for (std::uint64_t page = 0; page < kPages; ++page) {
      if (named_[page]) continue;
      const auto bytes = memory_.bytes_of(page);
      require(std::all_of(bytes.begin(), bytes.end(), [](std::byte each) { return each == std::byte{}; }));
    }
  }

  const std::uint8_t how_;
  Memory memory_;
  std::vector<bool> named_;
  std::shared_ptr<Receiver> receiver_;
  FrameScript script_;
  std::vector<std::unique_ptr<Peer>> peers_;
  std::vector<FrameSplitter> answers_;
  std::uint32_t epoch_ = 0;
  std::uint64_t barriers_ = 0;
  bool switched_ = false;
};

}  // namespace
}  // namespace memferry::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  memferry::fuzz::Input input(data, size);
  using memferry::fuzz::kMayPage, memferry::fuzz::kFromStart;
  const unsigned allowed = memferry::fuzz::userfaultfd_there() ? ~0U : ~unsigned{kMayPage | kFromStart};
  memferry::fuzz::World world(static_cast<std::uint8_t>(input.byte() & allowed));
  for (std::size_t parts = 0; parts < memferry::fuzz::kMostParts && !input.empty(); ++parts)
    world.part(input);
  return 0;
}
