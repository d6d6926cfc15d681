// Directory servers as samplers and spreaders are told of them.
//
// Thread: an environment's own.
#pragma once

#include <vector>

#include "bind/node_api.h"
#include "spread/directory_link.h"

namespace memferry::bind {

[[nodiscard]] std::vector<Directory> directories_of(const Napi::Value& value);
[[nodiscard]] Napi::Array flags(Napi::Env env, const std::vector<bool>& values);

}  // namespace memferry::bind
