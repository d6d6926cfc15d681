// One image at every VMD server that has it, opened for reading or made for writing; committed and dissolved at those that
// live: src/staging/image-set.ts, as far as a claim and a park need it. The first server is home; the order is the
// ordinals', for everyone. What its maker does: staged_image_maker.cc.
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

// Of an image that is made.
struct NewImage {
  std::string name;  // the guest's, for reports
  std::uint64_t page_size = 0;
  unsigned replicas = 1;
  // How long the servers keep what is not committed once nobody has it open.
  std::chrono::milliseconds lease{60000};
  struct Region {
    std::string name;
    std::uint64_t pages = 0;
    std::uint64_t capacity_pages = 0;
  };
  std::vector<Region> regions;
};

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
  // Opens it where that has failed, again and again, until fewer servers are missing than have a copy of each page, or the
  // bound is reached.
  void open_missing(std::size_t copies, std::chrono::milliseconds patience);
  // By ordinal, whether it could not be opened there.
  [[nodiscard]] std::vector<bool> missing() const;
  // Why not, of the first of them.
  [[nodiscard]] Failure why_missing() const;

  // A parked guest's image at every one of these servers, in this order, or at none: throws Failure, the first server's that
  // refuses.
  void make(std::vector<std::unique_ptr<StageClient>> clients, const NewImage& image);
  // Of pages, which all of them decode (wire::kEncodings).
  [[nodiscard]] std::uint16_t encodings() const { return encodings_; }
  // Connections that have ended are made anew, or the servers' leases would run out. Throws Failure: home has lost the
  // image. Does not wait for long: who cannot be reached is asked again the next time.
  void keep_open();
  // The engine has given the server up: what it holds counts for nothing, and only dissolve() asks it again.
  void give_up(std::size_t ordinal, const std::string& why);
  // Hexadecimal digests, one a region. A server that does not answer is out from then on.
  void seal(const std::vector<std::string>& digests);
  // At home. Throws Failure.
  void put_state(const OfferedGuest& guest, const std::shared_ptr<const Bytes>& state);
  // The servers other than home keep their pages for good, as far as they can be asked.
  struct Held {
    std::size_t given_up = 0;  // by the engine, before
    std::size_t not_held = 0;  // of the others
    Cause why;                 // the first of those
  };
  [[nodiscard]] Held hold();

  // For the engines: all of the list, in order. One that was not opened has a session that it will refuse.
  [[nodiscard]] std::vector<StageServer> servers() const;

  // At home, over a connection that is made anew where the old one is gone. Throws Failure.
  Channel::Received ask_home(const Json& request, const char* wanted);
  // `claim`: of before the connection was cut. Throws Failure.
  void reopen_home(const Json& claim);
  // A new connection to ask home about the commit, also where it has lost the image. Throws Failure.
  void redial_home(std::chrono::milliseconds patience);
  // Of the commit: no request, no answer of its own. False: it cannot be sent.
  bool tell_home(const Json& message);
  // Throws Failure: the connection has ended. Nothing by then, or no connection: no answer.
  [[nodiscard]] std::optional<CommitAnswer> hear_home(std::chrono::steady_clock::time_point until);
  void forget_home();
  [[nodiscard]] bool has_home() const;

  // No lease or time to live ends it at any of them from `first` on. Who cannot be asked within the bound is passed over.
  void commit(std::size_t first);
  // What its source sealed it with; none where it has not sealed it, or nobody can be asked.
  [[nodiscard]] std::optional<std::vector<std::string>> digests() const;
  // False: home does not let go of it, so nobody else was asked. A server that still cannot be reached keeps its part until
  // its operator drops it. `epoch`: of the claim by which the guest resumed, or 0.
  bool dissolve(std::uint32_t epoch);

 private:
  struct Member;
  [[nodiscard]] Json about(const char* type) const;
  [[nodiscard]] Json opening(const StageClient& client, const char* access, Json claim = nullptr) const;
  void open_one(Member& member, std::size_t ordinal) const;
  void try_to_open(Member& member, std::size_t ordinal) const;
  void make_one(Member& member, Json create) const;
  // For control. `patience`: with each step of it, or as long as the options say.
  [[nodiscard]] std::unique_ptr<StageClient> dial_again(
      const Member& member, std::optional<std::chrono::milliseconds> patience = {}) const;
  void reopen(Member& member, Json claim = nullptr,
              std::optional<std::chrono::milliseconds> patience = {}) const;
  // Again over new connections as long as that; what the server itself refuses is thrown at once.
  Channel::Received ask(Member& member, const Json& request, const char* wanted,
                        std::chrono::milliseconds patience,
                        const std::shared_ptr<const Bytes>& binary = nullptr) const;
  // A few at a time; `act` throws nothing.
  void at_all(std::size_t first, const std::function<void(Member&, std::size_t)>& act);

  const std::string id_;
  const Key secret_;
  const VmdOptions options_;
  wire::MigrationId bytes_{};
  std::uint16_t encodings_ = 0;
  std::vector<Member> members_;
};

// Of an image's or a guest's info: hexadecimal digests, one a region; none where there are none. Throws Failure.
[[nodiscard]] std::optional<std::vector<std::string>> digests_of(const Json& info);

}  // namespace memferry::control
