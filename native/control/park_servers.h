// The servers of a park: those of a list that answer, if they have room for the guest.
#pragma once

#include <memory>
#include <vector>

#include "control/placement.h"
#include "control/stage_client.h"
#include "control/vmd.h"

namespace memferry::control {

// In the list's order. Who does not answer is passed over. Throws Failure: the first one's where none answers;
// VMD_CAPACITY, which names who did not answer. std::invalid_argument: one is named twice, or how many?
[[nodiscard]] std::vector<std::unique_ptr<StageClient>> dial_servers(const std::vector<VmdAddress>& servers,
                                                                     const VmdOptions& options,
                                                                     const PlacementNeed& need);

}  // namespace memferry::control
