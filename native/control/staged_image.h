// One image at every VMD server that has it, opened for reading; committed and dissolved at those that live. The part of
// src/staging/image-set.ts that a reader needs. The first server is home; the order is the ordinals', for everyone.
//
// Threads: one caller at a time; servers are spoken to side by side, by threads of its own (mf-image).
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "control/messages.h"
#include "control/stage_client.h"
#include "transfer/stage_server_address.h"

namespace memferry::control {

class StagedImage {
 public:
  // Whose failure open() may not get over.
  enum class Required : std::uint8_t { kAll, kHome };
  static constexpr std::size_t kMostServers = 250;

  // `id`: 32 hexadecimal digits.
  StagedImage(std::string id, const Key& secret, VmdOptions options);
  ~StagedImage();
  StagedImage(const StagedImage&) = delete;
  StagedImage& operator=(const StagedImage&) = delete;

  // What a server says of the image; nothing is kept of it.
  [[nodiscard]] Json look(const std::string& host, std::uint16_t port) const;
  // Throws Failure: the first required server that cannot be reached, or has lost the image, and PROTOCOL_ERROR for a
  // server whose place in the list is another.
  void open(const std::vector<OfferedServer>& servers, Required required);
  // For the receiver: all of the list, in order. One that was not opened has a session that it will refuse.
  [[nodiscard]] std::vector<StageServer> servers() const;

  // At home, over a connection that is made anew where the old one is gone. Throws Failure.
  Channel::Received ask_home(const Json& request, const char* wanted);
  // `claim`: of before the connection was cut. Throws Failure.
  void reopen_home(const Json& claim);
  void forget_home();
  [[nodiscard]] bool has_home() const;

  // No lease or time to live ends it at any of them from `first` on. Who cannot be asked within the bound is passed over.
  void commit(std::size_t first);
  // What its source sealed it with; none where it has not sealed it, or nobody can be asked.
  [[nodiscard]] std::optional<std::vector<std::string>> digests() const;
  // False: home does not let go of it, so nobody else was asked. A server that cannot be reached keeps its part until its
  // operator drops it. `epoch`: of the claim by which the guest resumed, or 0.
  bool dissolve(std::uint32_t epoch);

 private:
  struct Member;
  [[nodiscard]] Json about(const char* type) const;
  [[nodiscard]] Json opening(const StageClient& client, const char* access, Json claim = nullptr) const;
  void open_one(Member& member, std::size_t ordinal) const;
  void reopen(Member& member, Json claim = nullptr) const;
  // Again over new connections as long as that; what the server itself refuses is thrown at once.
  Channel::Received ask(Member& member, const Json& request, const char* wanted,
                        std::chrono::milliseconds patience) const;
  // A few at a time; `act` throws nothing.
  void at_all(std::size_t first, const std::function<void(Member&, std::size_t)>& act);

  const std::string id_;
  const Key secret_;
  const VmdOptions options_;
  wire::MigrationId bytes_{};
  std::vector<Member> members_;
};

// Of an image's or a guest's info: hexadecimal digests, one a region; none where there are none. Throws Failure.
[[nodiscard]] std::optional<std::vector<std::string>> digests_of(const Json& info);

}  // namespace memferry::control
