// The control connection of the core's own destination and VMD client: frames, JSON, messages, the handshake, a channel as
// a whole, what a VMD server answers, and the two machines of the commit.
//
// Input: u8 what (a member of kTargets), then what that one says.
#include <fcntl.h>
#include <sys/socket.h>

#include <array>
#include <optional>
#include <string>
#include <thread>

#include "control/channel.h"
#include "control/commit_source.h"
#include "control/control_frame.h"
#include "control/handshake.h"
#include "control/messages.h"
#include "control/schema.h"
#include "control/staged_image.h"
#include "control/text.h"
#include "control/tombstones.h"
#include "control/vmd.h"
#include "loopback.h"
#include "os/worker_thread.h"

namespace memferry::fuzz {
namespace {

using namespace control;

const Bytes kSecret(32, 7);
constexpr std::uint64_t kMostBinary = 1 << 20;
constexpr std::size_t kMostFrames = 32;

std::string text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}
ByteSpan bytes_in(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()};
}

// Whatever is wrong with what a peer says is a Failure, by a code that is one of memferry's; nothing else is thrown.
template <typename Act>
bool allowed(const Act& act) {
  try {
    act();
    return true;
  } catch (const Failure& failure) {
    require(known_code(failure.code()));
    return false;
  }
}

// A header and a frame as they lie in a stream.
void frame(Input& input) {
  std::array<std::uint8_t, kFrameHeaderBytes> bytes{};
  const auto given = bytes_in(input.bytes(bytes.size()));
  std::copy(given.begin(), given.end(), bytes.begin());
  control::FrameHeader header;
  if (!allowed([&] { header = parse_frame_header(bytes); })) return;
  require(header.payload_bytes <= kAnnouncementBytes + kMaxJsonBytes);
  const auto payload = bytes_in(input.bytes(header.payload_bytes));
  if (payload.size() < header.payload_bytes) return;
  FrameAuthenticator sealer(Key{1});
  FrameAuthenticator opener(Key{1});
  const Bytes sealed = sealer.seal(header.kind, {payload});
  require(std::equal(bytes.begin(), bytes.end(), sealed.begin()));
  const auto mac = ByteSpan(sealed).last(kFrameMacBytes);
  require(opener.opens(bytes, payload, mac));
  // Neither again nor with any other MAC.
  require(!opener.opens(bytes, payload, mac));
  FrameAuthenticator other(Key{1});
  Bytes wrong(mac.begin(), mac.end());
  wrong[input.byte() % wrong.size()] ^= 1U;
  require(!other.opens(bytes, payload, wrong));
}

void check_offer(const Offer& offer) {
  require(offer.channels >= 1 && offer.channels <= 16 && (offer.encodings & ~wire::kEncodings) == 0);
  require(!offer.guest.regions.empty() && offer.guest.regions.size() <= 64);
  require(!offer.scatter || (!offer.scatter->servers.empty() && offer.scatter->servers.size() <= 250 &&
                             offer.scatter->sealed_secret.size() <= 256));
  // What was understood of a guest is the same when it is said again.
  const Json said = guest_json(offer.guest);
  require(guest_json(offered_guest(said)) == said);
}

void message(const std::string& text) {
  Json json;
  if (!allowed([&] { json = parse_json(text); })) return;
  // Once more, and it is the same.
  require(parse_json(to_text(json)) == json);
  SourceSays says;
  const bool known = allowed([&] { says = source_message(json); });
  const bool bare = allowed([&] { check_source_message(json, {}); });
  const bool with_binary = allowed([&] { check_source_message(json, 1); });
  require(known == (bare || with_binary) && !(bare && with_binary));
  require(!allowed([&] { check_source_message(json, std::uint64_t{1} << 40U); }) ||
          says.type == SourceSays::Type::kState);
  if (known && says.type == SourceSays::Type::kOffer) check_offer(says.offer);
  if (known && says.type == SourceSays::Type::kCommit) {
    require(source_message(to_json(says.commit)).commit.epoch == says.commit.epoch);
    Tombstones tombstones;
    DestinationState over;
    over.phase = DestinationPhase::kAbandoned;
    tombstones.record("it", over);
    // Whoever was refused once is never told that it runs.
    if (const auto answer = tombstones.answer("it", says.commit))
      require(answer->type == CommitAnswer::Type::kRefused);
  }
  std::optional<CommitAnswer> answer;
  if (allowed([&] { answer = commit_answer(json); }) && answer) {
    require(known_code(answer->cause.code) || answer->type != CommitAnswer::Type::kRefused);
    require(commit_answer(to_json(*answer))->type == answer->type);
  }
  (void)allowed([&] { (void)encoding_flags(json); });
  (void)allowed([&] { (void)digests_of(json); });
  if (json.is_object() && json.contains("guest"))
    (void)allowed([&] { require(!offered_guest(json.at("guest")).regions.empty()); });
}

void texts(Input& input) {
  const std::size_t units = input.byte();
  const std::string text = text_of(input.rest());
  const std::string part = cut(text, units);
  require(text_length(part) <= units && text.starts_with(part));
  require(part == text || text_length(text) > units);
  Bytes bytes;
  if (allowed([&] { bytes = from_hex(text); })) require(to_hex(bytes) == text && is_hex(text, bytes.size()));
  try {
    const VmdAddress address = parse_address(text);
    require(!address.host.empty() && address.port != 0);
  } catch (const std::invalid_argument&) {
    // It is none.
  }
  const Key session{3};
  const wire::MigrationId id{4};
  require(!allowed([&] { (void)unseal(session, id, bytes_in(std::as_bytes(std::span(text))), "what"); }));
  Bytes sealed = control::seal(session, id, Key{5}, "what");
  require(unseal(session, id, sealed, "what") == Key{5});
  sealed[units % sealed.size()] ^= 1U;
  require(!allowed([&] { (void)unseal(session, id, sealed, "what"); }));
}

std::pair<UniqueFd, UniqueFd> pair() {
  std::array<int, 2> fds{};
  require(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds.data()) == 0);
  return {UniqueFd(fds[0]), UniqueFd(fds[1])};
}

// Nobody proves that it knows the secret by bytes that were there before the nonce.
void handshake(bool acceptor, Input& input) {
  const auto [ours, theirs] = pair();
  const int fd = ours.get();
  const auto bytes = input.rest();
  require(::send(theirs.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL) ==
          static_cast<ssize_t>(bytes.size()));
  ::shutdown(theirs.get(), SHUT_WR);
  const auto deadline = std::chrono::steady_clock::now() + kHang;
  require(!allowed([&] {
    (void)(acceptor ? handshake_as_acceptor(fd, kSecret, deadline, -1)
                    : handshake_as_dialler(fd, kSecret, deadline, -1));
  }));
}

// Frames behind a right handshake: u8 how (1: a wrong MAC, 2: bytes as they are, 4: of another length than said, 8: a binary
// part is announced, 16: without the blanks at its end), u8 kind, u8 units of eight bytes that follow, a u16 that is announced.
Bytes sealed_frames(Input& input, FrameAuthenticator& sealer) {
  Bytes all;
  for (std::size_t frames = 0; frames < kMostFrames && !input.empty(); ++frames) {
    const std::uint8_t how = input.byte();
    const auto kind = static_cast<FrameKind>(input.byte() % 8);
    const auto content = bytes_in(input.bytes(input.byte() * std::size_t{8}));
    if ((how & 2) != 0) {
      all.insert(all.end(), content.begin(), content.end());
      continue;
    }
    Bytes payload;
    if ((how & 8) != 0) {
      const auto announced = input.take<std::uint16_t>();
      payload = {static_cast<std::uint8_t>(announced), static_cast<std::uint8_t>(announced >> 8U), 0, 0};
    }
    payload.insert(payload.end(), content.begin(), content.end());
    // A text may be of any length.
    while ((how & 16) != 0 && payload.size() > 1 && payload.back() == ' ') payload.pop_back();
    Bytes sealed;
    // Our own side refuses to say what no peer takes.
    if (!allowed([&] { sealed = sealer.seal(kind, {payload}); })) continue;
    if ((how & 1) != 0) sealed.back() ^= 1U;
    if ((how & 4) != 0) sealed.pop_back();
    all.insert(all.end(), sealed.begin(), sealed.end());
  }
  return all;
}

bool send_all(int fd, ByteSpan bytes) {
  Peer peer{UniqueFd(::fcntl(fd, F_DUPFD_CLOEXEC, 0))};
  peer.write(std::as_bytes(bytes));
  peer.finish();
  serve(
      {&peer}, -1, [&] { return peer.ended() || (peer.written() && peer.finishing()); }, [](auto&) {});
  return true;
}

// The dialler of a channel whose owner reads no preface: here it is taken out between the two.
Key dial(int channel) {
  auto [dialling, relayed] = pair();
  Key key{};
  std::thread dialler([&key, fd = dialling.get()] {
    key = handshake_as_dialler(fd, kSecret, std::chrono::steady_clock::now() + kHang, -1);
  });
  Peer from_dialler(std::move(relayed));
  Peer from_channel{UniqueFd(::fcntl(channel, F_DUPFD_CLOEXEC, 0))};
  std::array<std::uint8_t, 8> preface{};
  bool prefaced = false;
  std::size_t to_dialler = 0;
  constexpr std::size_t kAnswers = 40 + 34;
  serve(
      {&from_dialler, &from_channel}, -1, [&] { return to_dialler == kAnswers && from_dialler.written(); },
      [&](std::vector<Peer*>&) {
        if (!prefaced) prefaced = from_dialler.read_struct(preface);
        if (prefaced) from_channel.write(from_dialler.received());
        const auto bytes = from_channel.received();
        to_dialler += bytes.size();
        from_dialler.write(bytes);
      });
  dialler.join();
  return key;
}

void channel(Input& input) {
  auto [ours, theirs] = pair();
  Channel::Options options;
  options.secret = kSecret;
  options.max_binary_bytes = kMostBinary;
  options.check = check_source_message;
  Channel channel(std::move(ours), std::move(options));
  const Key session = dial(theirs.get());
  FrameAuthenticator sealer(direction_key(session, Role::kDialler));
  const Bytes frames = sealed_frames(input, sealer);
  send_all(theirs.get(), frames);
  const auto take_all = [&] {
    while (const auto received = channel.take()) {
      check_source_message(received->message, received->binary
                                                  ? std::optional<std::uint64_t>(received->binary->size())
                                                  : std::nullopt);
    }
  };
  // Its end is read once all before it was; what it says meanwhile nobody reads.
  Peer drain(std::move(theirs));
  serve(
      {&drain}, -1, [&] { return drain.ended(); }, [&](auto&) { take_all(); });
  while (!channel.over()) {
    take_all();
    std::this_thread::yield();
  }
  take_all();
  require(channel.ended().has_value());
}

// The preface of a connection that was just accepted. False: it has ended.
bool read_preface(int fd) {
  std::array<std::byte, 8> preface{};
  for (std::size_t have = 0; have < preface.size();) {
    pollfd readable{fd, POLLIN, 0};
    require(::poll(&readable, 1, static_cast<int>(std::chrono::milliseconds(kHang).count())) == 1);
    const ssize_t got = ::recv(fd, preface.data() + have, preface.size() - have, 0);
    if (got <= 0) return false;
    have += static_cast<std::size_t>(got);
  }
  return true;
}

void answer_client(UniqueFd fd, Input& input) {
  if (!read_preface(fd.get())) return;
  (void)allowed([&] {
    const Key session =
        handshake_as_acceptor(fd.get(), kSecret, std::chrono::steady_clock::now() + kHang, -1);
    FrameAuthenticator sealer(direction_key(session, Role::kAcceptor));
    Bytes frames = sealer.seal(FrameKind::kJson, {bytes_of(R"({"type":"announce","freeBytes":1})")});
    const Bytes more = sealed_frames(input, sealer);
    frames.insert(frames.end(), more.begin(), more.end());
    send_all(fd.get(), frames);
    Peer drain(std::move(fd));
    serve(
        {&drain}, -1, [&] { return drain.ended(); }, [](auto&) {});
  });
}

// A server that knows the secret, and answers anything to a client that opens an image. The input is one connection's after
// the other's.
void answers_of_server(Input& input) {
  static const Loopback listening;
  WorkerThread server("server", [&input](WorkerThread& self) {
    while (!self.stopping()) {
      std::array<pollfd, 2> waiting = {{{listening.fd(), POLLIN, 0}, {self.wake_fd(), POLLIN, 0}}};
      ::poll(waiting.data(), waiting.size(), -1);
      while (UniqueFd fd = listening.accept()) answer_client(std::move(fd), input);
    }
  });
  VmdOptions options;
  options.secret = kSecret;
  options.max_state_bytes = kMostBinary;
  StagedImage image(std::string(32, 'a'), Key{9}, options);
  (void)allowed([&] {
    const Json info = image.look("127.0.0.1", listening.port());
    (void)digests_of(info);
  });
  (void)allowed([&] { image.open({{"name", "127.0.0.1", listening.port()}}, StagedImage::Required::kAll); });
}

// What the destination promises: it never runs what it has refused, nor refuses what it runs.
void commit(Input& input) {
  DestinationState destination;
  SourceState source;
  bool ran = false;
  bool refused = false;
  while (!input.empty()) {
    const std::uint8_t what = input.byte();
    const std::uint32_t epoch = input.byte() % 4;
    if (what % 2 == 0) {
      DestinationEvent event = DestinationEvent::of(static_cast<DestinationEvent::Type>(what / 2 % 5));
      event.question.type = static_cast<CommitQuestion::Type>(what / 16 % 4);
      event.question.epoch = epoch;
      const DestinationStep step = step_destination(destination, event);
      require(!destination.final() || step.state.phase == destination.phase);
      require(step.state.epoch >= destination.epoch);
      for (const DestinationAction& action : step.actions) {
        using Type = DestinationAction::Type;
        const bool no = action.type == Type::kAbandon ||
                        (action.type == Type::kSend && action.answer.type == CommitAnswer::Type::kRefused);
        ran = ran || action.type == Type::kResume;
        refused = refused || no;
        require(!(ran && refused));
      }
      destination = step.state;
    } else {
      SourceEvent event = SourceEvent::of(static_cast<SourceEvent::Type>(what / 2 % 13));
      event.answer.type = static_cast<CommitAnswer::Type>(what / 32 % 4);
      event.answer.epoch = event.epoch = epoch;
      event.timer = static_cast<SourceTimer>(what / 32 % 4);
      const bool was_final = source.phase == SourcePhase::kDeparted ||
                             source.phase == SourcePhase::kReclaimed ||
                             source.phase == SourcePhase::kReleased;
      const SourceStep step = step_source(source, event);
      require(!was_final || step.state.phase == source.phase);
      // Only a refusal or a fence leads back from a grant.
      const bool back =
          event.type == SourceEvent::Type::kFence ||
          (event.type == SourceEvent::Type::kMessage && event.answer.type == CommitAnswer::Type::kRefused);
      if (source.committed() && !step.state.committed()) require(back);
      source = step.state;
    }
  }
}

}  // namespace
}  // namespace memferry::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace memferry::fuzz;
  Input input(data, size);
  switch (input.byte() % 8) {
    case 0:
      frame(input);
      break;
    case 1:
      message(text_of(input.rest()));
      break;
    case 2:
      texts(input);
      break;
    case 3:
      handshake(true, input);
      break;
    case 4:
      handshake(false, input);
      break;
    case 5:
      channel(input);
      break;
    case 6:
      answers_of_server(input);
      break;
    default:
      commit(input);
  }
  return 0;
}
