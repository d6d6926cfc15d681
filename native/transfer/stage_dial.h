// Dialling a VMD server about an image, from either end of a migration.
//
// Threads: any; blocks its caller.
#pragma once

#include <chrono>
#include <memory>
#include <string>

#include "transfer/stage_server_address.h"
#include "wire/stream.h"

namespace memferry {

struct StageDial {
  std::shared_ptr<wire::Stream> stream;  // nullptr: `why` says what was in the way
  std::string why;
  bool for_good = false;  // the image is lost there, or no token is left: trying again is no use
};

// `attempt` counts up with every hello that may have been heard. `cancel_fd` readable means stop (-1: none).
[[nodiscard]] StageDial dial_stage(const StageServer& to, const wire::MigrationId& image,
                                   wire::StageRole role, std::uint32_t& attempt,
                                   std::chrono::steady_clock::time_point deadline, int cancel_fd);

}  // namespace memferry
