// The first bytes of a connection to a listener: only the one right hello is let in, and whatever came before it does not
// keep it out.
//
// Input: u8 kind (0: a hello for the receiver, 1: for the stage; 2 and up: bytes as they are), u8 how often a byte of it is
// changed, (u8 where, u8 to what) each; or the bytes.
#include "frame_script.h"
#include "loopback.h"
#include "page/region.h"
#include "stage/stage.h"
#include "transfer/listener.h"
#include "transfer/receiver.h"
#include "wire/later_tokens.h"

namespace memferry::fuzz {
namespace {

// As many as a stage's session or a receiver has sets of connections, all of which stay unused.
constexpr std::uint32_t kAttempts = 4;

class Listening {
 public:
  Listening() : stage_(Stage::create({.memory_bytes = Stage::kLeastMemory})) {
    // libcrypto sets itself up in the first thread that comes, and what it keeps there of a thread that outlives it counts
    // as leaked.
    (void)wire::later_token({}, 0, 0);
    ReceiverConfig config;
    config.regions = {Region::allocate(16 * system_page_size())};
    config.migration = id();
    config.channels = 1;
    for (std::uint8_t i = 0; i < 2 * kAttempts; ++i) config.tokens.push_back(token(i));
    receiver_ = Receiver::create(config);
    require(stage_->create_image({id(), {16}, 0, std::nullopt}));
    std::vector<wire::Token> tokens;
    for (std::uint8_t i = 0; i < kAttempts * wire::kStageRoles; ++i) tokens.push_back(token(i));
    // Nobody has the role that the fuzzer's hello names: what it says right is refused as well, and stays good.
    require(stage_->add_session(id(), 1, 1U << static_cast<unsigned>(wire::StageRole::kGather), tokens));
    Listener::Config listening;
    listening.host = "127.0.0.1";
    listener_ = std::make_unique<Listener>(std::move(listening));
    listener_->add(receiver_);
    listener_->serve_stage(stage_);
    address_ = wire::SocketAddress::parse("127.0.0.1", listener_->port());
  }
  ~Listening() {
    listener_->close();
    receiver_->close();
    stage_->close();
  }
  Listening(const Listening&) = delete;
  Listening& operator=(const Listening&) = delete;

  // What comes back for these bytes and the end of them.
  [[nodiscard]] std::vector<std::byte> answer(std::span<const std::byte> bytes) const {
    UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    require(fd.valid() && ::connect(fd.get(), address_.get(), address_.bytes()) == 0);
    Peer peer(std::move(fd));
    peer.write(bytes);
    peer.finish();
    serve(
        {&peer}, -1, [&] { return peer.ended(); }, [](auto&) {});
    return peer.received();
  }

  [[nodiscard]] static wire::Hello hello(bool stage) {
    wire::Hello hello{};
    hello.preface = stage ? wire::kStagePreface : wire::kDataPreface;
    hello.migration = id();
    hello.version = wire::kVersion;
    hello.channel = 0;
    // The last set: what is right for it alone is wrong before it.
    hello.epoch = stage ? 1U << 16U | 1U : 1;
    hello.token = token(stage ? wire::kStageRoles : 2);
    return hello;
  }

 private:
  static wire::MigrationId id() { return {1, 2, 3}; }
  static wire::Token token(std::uint8_t number) {
    wire::Token token{};
    token.fill(static_cast<std::uint8_t>(number + 1));
    return token;
  }

  const std::shared_ptr<Stage> stage_;
  std::shared_ptr<Receiver> receiver_;
  std::unique_ptr<Listener> listener_;
  wire::SocketAddress address_;
};

}  // namespace
}  // namespace memferry::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace memferry;
  using namespace memferry::fuzz;
  static const Listening listening;
  Input input(data, size);
  std::vector<std::byte> bytes;
  const std::uint8_t kind = input.byte();
  if (kind < 2) {
    // A redial before the switch, and a role that the session has not: refused, and never used up.
    wire::Hello hello = Listening::hello(kind == 1);
    const auto whole = std::as_writable_bytes(std::span(&hello, 1));
    for (std::uint8_t left = input.byte(); left > 0 && !input.empty(); --left) {
      const std::uint8_t at = input.byte();
      whole[at % whole.size()] = static_cast<std::byte>(input.byte());
    }
    // The one set of connections that would be let in.
    if (hello.preface == wire::kDataPreface) hello.epoch = std::max(hello.epoch, std::uint32_t{1});
    bytes.assign(whole.begin(), whole.end());
    const auto more = input.rest();
    bytes.insert(bytes.end(), more.begin(), more.end());
  } else {
    const auto rest = input.rest();
    bytes.assign(rest.begin(), rest.end());
  }
  const std::vector<std::byte> answer = listening.answer(bytes);
  if (answer.empty()) return 0;
  // Refused, in those words and no more.
  wire::HelloReply reply{};
  require(answer.size() == sizeof reply);
  std::memcpy(&reply, answer.data(), sizeof reply);
  require(reply.magic == wire::kFrameMagic);
  require(reply.status == static_cast<std::uint32_t>(wire::HelloStatus::kRefused) ||
          reply.status == static_cast<std::uint32_t>(wire::HelloStatus::kLost));
  return 0;
}
