// Connections to a VMD server as a whole: what anybody of an image or a domain may say, behind a right hello. One
// connection after the other, so that an input always does the same; what one has brought is there for the next.
//
// Input: u8 setup, then parts: u8 whose (a StageRole, kReplica: what the next server that is dialled answers, kOwner: a
// call), u8 how many frames, frames (frame_script.h).
#include <deque>
#include <memory>
#include <optional>

#include "frame_script.h"
#include "loopback.h"
#include "stage/stage.h"

namespace memferry::fuzz {
namespace {

using wire::FrameType;
using wire::Holders;
using wire::StageRole;

constexpr std::uint64_t kMemory = Stage::kLeastMemory;
constexpr std::array<std::uint64_t, 2> kRegions = {100, 600};
constexpr std::uint16_t kSession = 1;
constexpr std::uint16_t kChainSession = wire::kFirstChainSession + 1;
constexpr std::uint8_t kReplica = 6;
constexpr std::size_t kMostParts = 10;
constexpr std::size_t kMostFrames = 24;
enum Setup : std::uint8_t {
  kDomain = 1,
  kFull = 2,     // hardly any room is left
  kChained = 4,  // the second server can be dialled
  kSealed = 8,
};

wire::Token token(std::uint32_t attempt, std::size_t role) {
  wire::Token token{};
  token[0] = static_cast<std::uint8_t>(attempt + 1);
  token[1] = static_cast<std::uint8_t>(role);
  return token;
}

std::vector<wire::Token> tokens() {
  std::vector<wire::Token> all;
  for (std::uint32_t attempt = 0; attempt < kMostParts; ++attempt) {
    for (std::size_t role = 0; role < wire::kStageRoles; ++role) all.push_back(token(attempt, role));
  }
  return all;
}

ImageId id(std::uint8_t number) {
  ImageId made{};
  made[0] = number;
  return made;
}

class World {
 public:
  explicit World(std::uint8_t setup) : stage_(Stage::create({.memory_bytes = kMemory})) {
    const std::optional<DomainKey> domain =
        (setup & kDomain) != 0 ? std::optional<DomainKey>(DomainKey{7}) : std::nullopt;
    require(stage_->create_image({id(1), {kRegions.begin(), kRegions.end()}, 0, domain}));
    const unsigned roles =
        1U << static_cast<unsigned>(StageRole::kScatter) | 1U << static_cast<unsigned>(StageRole::kGather) |
        1U << static_cast<unsigned>(StageRole::kDemand) | 1U << static_cast<unsigned>(StageRole::kProbe);
    require(stage_->add_session(id(1), kSession, roles, tokens()));
    require(
        stage_->add_session(id(1), kChainSession, 1U << static_cast<unsigned>(StageRole::kChain), tokens()));
    require(stage_->join({id(2), DomainKey{7}, MemberGuest{1}}));
    require(stage_->add_session(id(2), kSession, 1U << static_cast<unsigned>(StageRole::kPopular), tokens()));
    if ((setup & kChained) != 0) {
      std::vector<wire::Token> chain(kMostParts);
      require(stage_->set_chain(id(1), 1, "127.0.0.1", replicas().port(), chain));
    }
    if ((setup & kSealed) != 0) require(stage_->seal(id(1)));
    if ((setup & kFull) != 0) take_room();
  }

  ~World() {
    check_image();
    require(stage_->drop(id(1)));
    require(stage_->drop(id(2)));
    stage_->drop(id(3));
    const StageStats stats = stage_->stats();
    require(stats.connections == 0 && stats.images == 0 && stats.members == 0);
    // Every slot is back, but for what is counted of popular pages, which outlives whoever told it.
    require(stats.hint_bytes == 0);
    require(stats.free_bytes + stats.popular_table_bytes == stats.slab_bytes);
    stage_->close();
  }
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  void part(Input& input) {
    const std::uint8_t whose = input.byte() % 8;
    std::vector<FrameScript::Frame> frames;
    bool cut = false;
    for (std::size_t left = input.byte() % (kMostFrames + 1); left > 0 && !input.empty() && !cut; --left) {
      frames.push_back(script_.next(input));
      cut = frames.back().cut;
    }
    if (whose == kReplica) {
      replica_answers_.clear();
      for (const auto& frame : frames)
        replica_answers_.insert(replica_answers_.end(), frame.bytes.begin(), frame.bytes.end());
    } else if (whose < wire::kStageRoles) {
      talk(static_cast<StageRole>(whose), frames);
    } else {
      owner();
    }
  }

 private:
  static const Loopback& replicas() {
    static const Loopback listening;
    return listening;
  }
  static const Loopback& clients() {
    static const Loopback listening;
    return listening;
  }

  // A state that leaves some slots. (An index of that size takes ten times as long to give back.)
  void take_room() {
    constexpr std::uint64_t kLeft = 24;
    require(stage_->create_image({id(3), {1}, 0, std::nullopt}));
    const std::uint64_t free = stage_->stats().free_bytes - kLeft * system_page_size();
    require(stage_->put_state(id(3), stage_->make_state(free)));
  }

  void owner() {
    if (const auto state = stage_->make_state(5000)) {
      state->write(0, std::array<std::byte, 5000>{});
      (void)stage_->put_state(id(1), state);
    }
    const auto whole = stage_->whole(id(1), kRegions);
    require(whole.has_value());
    check_image();
  }

  void check_image() {
    const auto stats = stage_->image(id(1));
    const std::uint64_t pages = kRegions[0] + kRegions[1];
    require(stats && stats->pages_known <= pages && stats->pages_held + stats->pages_zero <= pages &&
            stats->pages_shared <= stats->pages_held);
  }

  void talk(StageRole role, const std::vector<FrameScript::Frame>& frames) {
    auto [theirs, ours] = clients().connected();
    const bool member = role == StageRole::kPopular;
    const std::uint16_t session = role == StageRole::kChain ? kChainSession : kSession;
    std::uint32_t& attempt = attempts_[static_cast<std::size_t>(role)];
    wire::Hello hello{};
    hello.preface = wire::kStagePreface;
    hello.migration = id(member ? 2 : 1);
    hello.version = wire::kVersion;
    hello.channel = static_cast<std::uint16_t>(role);
    hello.epoch = std::uint32_t{session} << 16U | attempt;
    hello.token = token(attempt, static_cast<std::size_t>(role));
    ++attempt;
    require(stage_->attach(hello, theirs) == wire::HelloStatus::kAccepted);

    Peer client(std::move(ours));
    for (const auto& frame : frames) client.write(frame.bytes);
    client.finish();
    std::vector<std::unique_ptr<Peer>> dialled;
    serve(
        {&client}, replicas().fd(), [&] { return client.ended(); },
        [&](std::vector<Peer*>& peers) {
          while (UniqueFd fd = replicas().accept()) {
            dialled.push_back(std::make_unique<Peer>(std::move(fd)));
            dialled.back()->write_struct(wire::HelloReply{
                wire::kFrameMagic, static_cast<std::uint32_t>(wire::HelloStatus::kAccepted)});
            dialled.back()->write(replica_answers_);
            peers.push_back(dialled.back().get());
          }
        });
    // What was passed on is a hello, and frames like any other's.
    for (const auto& replica : dialled) {
      replica->step();
      wire::Hello said{};
      if (!replica->read_struct(said)) continue;
      require(said.preface == wire::kStagePreface && said.migration == id(1));
      FrameSplitter passed_on;
      passed_on.add(replica->received());
      for (FrameSplitter::Frame frame; passed_on.next(frame);) require(!frame.is(FrameType::kMap));
    }
    check_answers(role, frames, client);
  }

  void check_answers(StageRole role, const std::vector<FrameScript::Frame>& frames, Peer& client) {
    wire::HelloReply reply{};
    require(client.read_struct(reply) && reply.magic == wire::kFrameMagic && reply.status == 1);
    FrameSplitter answers;
    answers.add(client.received());
    std::deque<wire::FrameHeader> asked;
    for (const auto& frame : frames) asked.push_back(frame.header);
    FrameSplitter::Frame answer;
    while (answers.next(answer)) {
      switch (role) {
        case StageRole::kScatter:
        case StageRole::kChain:
          check_stored(answer, asked);
          break;
        case StageRole::kGather:
        case StageRole::kDemand:
          check_read(answer, asked);
          break;
        case StageRole::kProbe:
        case StageRole::kPopular:
          check_told(answer, asked);
          break;
      }
    }
    require(answers.empty());
  }

  // Drops those that are answered, and those before that have no answer, up to the first of this type.
  static wire::FrameHeader& question(std::deque<wire::FrameHeader>& asked, FrameType type) {
    while (!asked.empty() && asked.front().type != static_cast<std::uint16_t>(type)) asked.pop_front();
    require(!asked.empty());
    return asked.front();
  }

  static void check_stored(const FrameSplitter::Frame& answer, std::deque<wire::FrameHeader>& asked) {
    if (answer.is(FrameType::kRefused)) {
      require(answer.header.region < kRegions.size() && answer.header.tag <= 1);
      require(wire::run_inside(answer.header.first_page, answer.header.page_count,
                               kRegions[answer.header.region]));
    } else if (answer.is(FrameType::kBarrierAck)) {
      require(question(asked, FrameType::kBarrier).tag == answer.header.tag);
      asked.pop_front();
    } else {
      require(answer.is(FrameType::kChainBroken) || answer.is(FrameType::kTaken));
    }
  }

  void check_read(const FrameSplitter::Frame& answer, std::deque<wire::FrameHeader>& asked) {
    require(!asked.empty());
    wire::FrameHeader& question = asked.front();
    if (answer.is(FrameType::kMap) || answer.is(FrameType::kMapEnd)) {
      require(question.type == static_cast<std::uint16_t>(FrameType::kMapRequest));
      if (answer.is(FrameType::kMapEnd)) {
        asked.pop_front();
        return;
      }
      require(wire::run_inside(answer.header.first_page, answer.header.page_count,
                               kRegions[answer.header.region]));
      return;
    }
    const bool read = question.type == static_cast<std::uint16_t>(FrameType::kRead);
    require(read || question.type == static_cast<std::uint16_t>(FrameType::kHashRequest));
    require(answer.is(read ? FrameType::kPages : FrameType::kHashes) || answer.is(FrameType::kZero) ||
            answer.is(FrameType::kAbsent));
    require(answer.header.tag == question.tag && answer.header.region == question.region &&
            answer.header.first_page == question.first_page &&
            answer.header.page_count <= question.page_count);
    // Nobody has ever sent anything else.
    for (const std::uint64_t hash : answer.hashes) require(script_.said(hash));
    question.first_page += answer.header.page_count;
    question.page_count -= answer.header.page_count;
    if (question.page_count == 0) asked.pop_front();
  }

  static void check_told(const FrameSplitter::Frame& answer, std::deque<wire::FrameHeader>& asked) {
    constexpr std::array<std::pair<FrameType, FrameType>, 5> kAnswers = {
        {{FrameType::kProbed, FrameType::kProbe},
         {FrameType::kNamed, FrameType::kNames},
         {FrameType::kReported, FrameType::kReport},
         {FrameType::kPopularNames, FrameType::kPopularAsk},
         {FrameType::kPopularPages, FrameType::kPopularRead}}};
    for (const auto& [type, to] : kAnswers) {
      if (!answer.is(type)) continue;
      const wire::FrameHeader& asking = question(asked, to);
      require(answer.header.tag == asking.tag);
      if (type == FrameType::kProbed || type == FrameType::kReported)
        require(answer.header.page_count == asking.page_count);
      if (type == FrameType::kPopularNames || type == FrameType::kPopularPages)
        require(answer.header.page_count <= asking.page_count);
      asked.pop_front();
      return;
    }
    require(false);
  }

  const std::shared_ptr<Stage> stage_;
  FrameScript script_;
  std::array<std::uint32_t, wire::kStageRoles> attempts_{};
  std::vector<std::byte> replica_answers_;
};

}  // namespace
}  // namespace memferry::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  memferry::fuzz::Input input(data, size);
  memferry::fuzz::World world(input.byte());
  for (std::size_t parts = 0; parts < memferry::fuzz::kMostParts && !input.empty(); ++parts)
    world.part(input);
  return 0;
}
