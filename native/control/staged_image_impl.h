// What a staged image is made of, for its own files.
#pragma once

#include <chrono>
#include <cstddef>
#include <memory>
#include <optional>
#include <vector>

#include "control/staged_image.h"

namespace memferry::control {

inline constexpr std::size_t kStageAttempts = 64;
inline constexpr std::uint64_t kLastStageSession = 0xfeff;
// Of what must be heard by a server that was cut off.
inline constexpr std::chrono::milliseconds kPatience{10000};

struct StagedImage::Member {
  std::unique_ptr<StageClient> client;  // null: there is no connection
  bool opened = false;
  bool misplaced = false;  // it says that it stands elsewhere in the list, which then is wrong for everybody
  bool given_up = false;   // by the engine
  std::uint16_t encodings = 0;  // at its maker: of pages, which it decodes
  StageServer server;
  std::optional<Cause> cause;
};

// Of a session's stage connections.
[[nodiscard]] std::vector<wire::Token> stage_tokens(const Key& session, const wire::MigrationId& image,
                                                    std::uint16_t number);

}  // namespace memferry::control
