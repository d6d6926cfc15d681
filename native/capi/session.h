// The part of an engine's options that both sides must have alike.
#pragma once

#include <vector>

#include "capi/memferry.h"
#include "wire/frame.h"

namespace memferry::capi {

// Throws std::invalid_argument.
void apply(const memferry_session& session, wire::MigrationId& migration, unsigned& channels,
           std::vector<wire::Token>& tokens);

}  // namespace memferry::capi
