#include "transfer/stage_dial.h"

#include <algorithm>
#include <system_error>

#include "wire/hello.h"
#include "wire/later_tokens.h"
#include "wire/socket.h"

namespace memferry {

StageDial dial_stage(const StageServer& to, const wire::MigrationId& image, wire::StageRole role,
                     std::uint32_t& attempt, std::chrono::steady_clock::time_point deadline, int cancel_fd) {
  const std::string where = "server " + to.name + ": ";
  const auto failed = [&](const std::string& why, bool for_good = false) {
    return StageDial{nullptr, where + why, for_good};
  };
  try {
    const std::optional<wire::Token> token = wire::session_token(to.tokens, role, attempt);
    if (!token) return failed("no token is left for another connection", true);
    const auto left =
        std::chrono::ceil<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
    wire::DialResult dialled = wire::dial(wire::SocketAddress::parse(to.host, to.port),
                                          std::max(left, std::chrono::milliseconds(1)), cancel_fd);
    if (dialled.kind == wire::DialResult::Kind::kFailed) {
      return failed(std::generic_category().message(dialled.error));
    }
    if (dialled.kind != wire::DialResult::Kind::kConnected) return failed("no answer in time");
    if (role == wire::StageRole::kScatter) wire::bear_with_full_window(dialled.fd.get());
    auto stream = std::make_shared<wire::PlainStream>(std::move(dialled.fd));
    wire::Hello hello{};
    hello.preface = wire::kStagePreface;
    hello.migration = image;
    hello.version = wire::kVersion;
    hello.channel = static_cast<std::uint16_t>(role);
    hello.epoch = std::uint32_t{to.session} << 16 | attempt;
    hello.token = *token;
    ++attempt;
    wire::HelloReply reply{};
    wire::IoResult result = stream->send_all(std::as_bytes(std::span(&hello, 1)));
    if (result.done()) {
      result =
          wire::receive_until(*stream, std::as_writable_bytes(std::span(&reply, 1)), deadline, cancel_fd);
    }
    if (!result.done()) return failed("no answer to a hello: " + result.describe());
    if (reply.magic == wire::kFrameMagic &&
        reply.status == static_cast<std::uint32_t>(wire::HelloStatus::kAccepted)) {
      return {std::move(stream), {}, false};
    }
    const bool lost = reply.status == static_cast<std::uint32_t>(wire::HelloStatus::kLost);
    return failed(lost ? "it has lost the image (restarted, or dropped)" : "it refused the connection", lost);
  } catch (const std::exception& error) {
    return failed(error.what());
  }
}

}  // namespace memferry
