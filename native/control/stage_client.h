// A control connection to a VMD server, as its client keeps one: requests with their answers, one after the other. The
// messages are src/protocol/stage-messages.ts's.
//
// Threads: one caller at a time; the channel has its own.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "control/channel.h"
#include "transfer/stage_server_address.h"

namespace memferry::control {

struct VmdOptions {
  Bytes secret;
  bool plaintext = false;
  std::uint64_t max_state_bytes = 64ULL << 20U;
  std::chrono::milliseconds connect_timeout{5000};
  std::chrono::milliseconds recover_timeout{60000};
  std::chrono::milliseconds in_doubt_timeout{30000};
  std::chrono::milliseconds peer_timeout{10000};
  std::chrono::milliseconds introduction_timeout{
      5000};  // of a new connection, until the server has said its name
  std::chrono::milliseconds answer_timeout{30000};
  // Claims a guest although servers are away that have pages of which there is no other copy.
  bool with_losses = false;
  // Looked at while an answer is waited for: true ends it (CANCELLED). May be empty; from the caller's threads.
  std::function<bool()> cancelled;
};

class StageClient {
 public:
  // Connected and authenticated; the server has said its name. Throws Failure: CONNECT_FAILED, AUTH_FAILED, PEER_LOST.
  StageClient(std::string host, std::uint16_t port, const VmdOptions& options);
  StageClient(const StageClient&) = delete;
  StageClient& operator=(const StageClient&) = delete;

  [[nodiscard]] const std::string& host() const { return host_; }
  [[nodiscard]] std::uint16_t port() const { return port_; }
  [[nodiscard]] const std::string& name() const { return name_; }
  [[nodiscard]] const Key& session() const { return session_; }

  // What it said of itself when it was dialled.
  [[nodiscard]] const Json& announcement() const { return announcement_; }
  // The connection is there, as far as is known.
  [[nodiscard]] bool alive() const { return !channel_->ended(); }

  // The answer of type `wanted`; `patience`: or as long as the options say. Throws Failure: the server's own refusal,
  // PEER_LOST, PROTOCOL_ERROR.
  Channel::Received ask(Json request, const char* wanted, std::shared_ptr<const Bytes> binary = nullptr,
                        std::optional<std::chrono::milliseconds> patience = {});
  // Of what has no answer of its own: a commit's questions. False: it cannot be sent any more.
  bool tell(const Json& message) { return channel_->send(message); }
  // The next that answers no request, or nothing by then. Throws Failure: the connection has ended.
  std::optional<Json> hear(std::chrono::steady_clock::time_point until);

 private:
  [[nodiscard]] std::optional<Channel::Received> next(std::chrono::steady_clock::time_point until);
  [[nodiscard]] Channel::Received must_hear(std::chrono::steady_clock::time_point until);

  std::string host_;
  std::uint16_t port_;
  std::string name_;
  Key session_{};
  Json announcement_;
  std::uint32_t next_request_ = 1;
  const std::chrono::milliseconds answer_timeout_;
  const std::function<bool()> cancelled_;
  struct Ear {
    std::mutex mutex;  // guards rang
    std::condition_variable changed;
    bool rang = false;
    bool introduced = false;  // the channel's thread's: the server has said its name
  };
  std::shared_ptr<Ear> ear_ = std::make_shared<Ear>();
  std::unique_ptr<Channel> channel_;
};

}  // namespace memferry::control
