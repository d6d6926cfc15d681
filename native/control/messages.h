// What the control connection says, checked on arrival: src/protocol/messages.ts in C++. Nothing that is not known is let
// through, sizes and counts are bounded.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "control/commit_destination.h"
#include "control/crypto.h"
#include "control/json.h"

namespace memferry::control {

struct OfferedRegion {
  std::string name;
  std::uint64_t length_bytes = 0;
  std::uint64_t capacity_bytes = 0;
  std::uint64_t page_size = 0;
};

struct OfferedModule {
  std::string name;
  std::string sha256;  // hexadecimal
};

struct OfferedServer {
  std::string name;
  std::string host;
  std::uint16_t port = 0;
};

// A guest as an offer names it, or as it was parked.
struct OfferedGuest {
  std::string name;
  std::optional<OfferedModule> module;
  std::string description;  // JSON, the source's own
  std::vector<OfferedRegion> regions;
};

struct Offer {
  std::string id;  // 32 hexadecimal digits
  wire::MigrationId migration{};
  std::string mode;
  bool may_page = false;
  bool verify = false;
  unsigned channels = 1;
  std::uint16_t encodings = 0;  // wire::kEncodings
  bool replay = false;
  struct Scatter {
    std::vector<OfferedServer> servers;
    Bytes sealed_secret;
    double gather_timeout_ms = 0;
  };
  std::optional<Scatter> scatter;
  OfferedGuest guest;
};

struct SourceSays {
  enum class Type : std::uint8_t {
    kOffer,
    kResumeSession,
    kBaseCancel,
    kBaseSkipReplay,
    kGrow,
    kAskMissing,
    kState,
    kEvicted,
    kGoodbye,
    kCommit,
  };
  Type type = Type::kGoodbye;
  Offer offer;                                      // kOffer
  std::string migration;                            // kResumeSession
  Bytes proof;                                      // kResumeSession
  std::uint32_t region = 0;                         // kGrow
  std::uint64_t length_bytes = 0;                   // kGrow
  std::uint64_t question = 0;                       // kAskMissing
  bool paging = false;                              // kState
  std::optional<std::vector<std::string>> digests;  // kEvicted
  CommitQuestion commit;                            // kCommit
};

// Throws Failure (PROTOCOL_ERROR): not one of these.
[[nodiscard]] SourceSays source_message(const Json& message);
// For Channel::Options::check: the same, and a binary part where there must be one, nowhere else.
void check_source_message(const Json& message, std::optional<std::uint64_t> binary_bytes);

[[nodiscard]] OfferedGuest offered_guest(const Json& guest);
// For an offer, or a parked guest's.
[[nodiscard]] Json guest_json(const OfferedGuest& guest);

// One of the other side's answers, or nothing for a message that is none. Throws Failure (PROTOCOL_ERROR).
[[nodiscard]] std::optional<CommitAnswer> commit_answer(const Json& message);
[[nodiscard]] Json to_json(const CommitAnswer& answer);
[[nodiscard]] Json to_json(const CommitQuestion& question);

// Names of wire::kEncodings.
[[nodiscard]] Json encoding_names(std::uint16_t flags);
[[nodiscard]] std::uint16_t encoding_flags(const Json& names);

}  // namespace memferry::control
