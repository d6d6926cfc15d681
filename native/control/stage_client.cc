#include "control/stage_client.h"

#include <fcntl.h>

#include <algorithm>
#include <utility>

#include "control/schema.h"
#include "wire/socket.h"

namespace memferry::control {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kLookAgain{100};
constexpr std::size_t kSlowestBytesPerMs = 125;  // 1 Mbit/s, as docs/protocol.md has it

UniqueFd connected(const std::string& host, std::uint16_t port, const VmdOptions& options) {
  const wire::SocketAddress address = wire::SocketAddress::parse(host, port);
  if (!options.plaintext && !address.loopback())
    throw Failure("PLAINTEXT_REQUIRED",
                  host + " is not a loopback address, and the connection is not encrypted");
  wire::DialResult dialled = wire::dial(address, options.connect_timeout, -1);
  if (dialled.kind != wire::DialResult::Kind::kConnected)
    throw Failure("CONNECT_FAILED", "VMD server " + address.describe() + " cannot be reached");
  const int flags = ::fcntl(dialled.fd.get(), F_GETFL);
  if (flags < 0 || ::fcntl(dialled.fd.get(), F_SETFL, flags | O_NONBLOCK) != 0)
    throw Failure("SYSTEM", "fcntl");
  return std::move(dialled.fd);
}

// The fields are looked at where they are used.
void check(const Json& message, std::optional<std::uint64_t>) {
  if (!message.is_object() || !message.contains("type") || !message.at("type").is_string())
    throw Failure("PROTOCOL_ERROR", "a control message is not allowed at type");
}

}  // namespace

StageClient::StageClient(std::string host, std::uint16_t port, const VmdOptions& options)
    : host_(std::move(host)),
      port_(port),
      name_(host_ + ":" + std::to_string(port)),
      answer_timeout_(options.answer_timeout),
      cancelled_(options.cancelled) {
  UniqueFd fd = connected(host_, port_, options);
  Channel::Options of;
  of.role = Role::kDialler;
  of.secret = options.secret;
  of.max_binary_bytes = options.max_state_bytes;
  of.peer_timeout = options.peer_timeout;
  of.check = check;
  // It announces itself each second; who asks nothing for a while would be full of that.
  of.unheard = [ear = ear_](const Json& message) {
    return message.at("type") == "announce" && std::exchange(ear->introduced, true);
  };
  of.changed = [ear = ear_] {
    {
      const std::lock_guard lock(ear->mutex);
      ear->rang = true;
    }
    ear->changed.notify_all();
  };
  channel_ = std::make_unique<Channel>(std::move(fd), std::move(of));
  const Clock::time_point until = Clock::now() + options.introduction_timeout;
  for (;;) {
    const Channel::Received heard = must_hear(until);
    if (heard.message.at("type") != "announce") continue;
    if (const auto& name = heard.message.value("name", Json()); name.is_string())
      name_ = name.get<std::string>();
    announcement_ = heard.message;
    break;
  }
  session_ = channel_->session().value();
}

std::optional<Channel::Received> StageClient::next(Clock::time_point until) {
  for (;;) {
    const auto ended = channel_->ended();
    if (auto received = channel_->take()) return std::move(*received);
    if (ended) {
      const Cause cause =
          ended->code.empty() ? Cause{"PEER_LOST", "the server ended the connection"} : *ended;
      throw Failure(cause.code, "VMD server " + name_ + ": " + cause.message);
    }
    if (cancelled_ && cancelled_()) throw Failure("CANCELLED", "nobody waits for the VMD servers any more");
    const Clock::time_point look = cancelled_ ? std::min(until, Clock::now() + kLookAgain) : until;
    std::unique_lock lock(ear_->mutex);
    if (!ear_->changed.wait_until(lock, look, [this] { return ear_->rang; }) && Clock::now() >= until)
      return {};
    ear_->rang = false;
  }
}

Channel::Received StageClient::must_hear(Clock::time_point until) {
  if (auto heard = next(until)) return std::move(*heard);
  throw Failure("PEER_LOST", "VMD server " + name_ + " does not answer");
}

std::optional<Json> StageClient::hear(Clock::time_point until) {
  while (auto heard = next(until)) {
    if (!heard->message.contains("request")) return std::move(heard->message);
  }
  return {};
}

Channel::Received StageClient::ask(Json request, const char* wanted, std::shared_ptr<const Bytes> binary,
                                   std::optional<std::chrono::milliseconds> patience) {
  const std::uint32_t number = next_request_++;
  request["request"] = number;
  // A state takes its time; the least that a link is expected to carry.
  const std::chrono::milliseconds moving(binary ? binary->size() / kSlowestBytesPerMs : 0);
  if (!channel_->send(request, std::move(binary)))
    throw Failure("PEER_LOST", "VMD server " + name_ + " cannot be asked any more");
  const Clock::time_point until = Clock::now() + patience.value_or(answer_timeout_) + moving;
  for (;;) {
    Channel::Received heard = must_hear(until);
    Fields fields(heard.message, "");
    const std::string type = fields.text("type", 1, 64);
    if (!heard.message.contains("request") || fields.count("request", 0, kMaxEpoch) != number) continue;
    if (type == "declined") {
      const Cause cause = from_peer(fields.text("code", 1, 64), fields.text("message", 0, 4096));
      throw Failure(cause.code, "VMD server " + name_ + ": " + cause.message);
    }
    if (type != wanted)
      throw Failure("PROTOCOL_ERROR", "'" + type + "' as answer to what '" + wanted + "' answers");
    return heard;
  }
}

}  // namespace memferry::control
