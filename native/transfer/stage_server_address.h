// A VMD server of a migration, as the engines at both ends are told of it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "wire/frame.h"

namespace memferry {

struct StageServer {
  std::string name;  // for errors and reports
  std::string host;  // numeric address
  std::uint16_t port = 0;
  std::uint16_t session = 0;
  std::vector<wire::Token> tokens;  // [attempt * wire::kStageRoles + role]
  std::uint64_t identity = 0;       // the stage's; 0: not known, and nothing is deduplicated there
};

}  // namespace memferry
