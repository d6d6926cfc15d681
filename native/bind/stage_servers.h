// The VMD servers of a migration as both engines are told of them, and what they did for it.
//
// Thread: an environment's own.
#pragma once

#include <vector>

#include "bind/node_api.h"
#include "bind/values.h"
#include "transfer/stage_server_address.h"

namespace memferry::bind {

[[nodiscard]] std::vector<StageServer> stage_servers_of(const Napi::Value& value);

// `stats`: anything with pages, bytes and failed (why, or empty).
template <typename Stats>
[[nodiscard]] Napi::Array server_stats(Napi::Env env, const std::vector<Stats>& stats) {
  Napi::Array array = Napi::Array::New(env, stats.size());
  for (std::size_t i = 0; i < stats.size(); ++i) {
    Napi::Object object = Napi::Object::New(env);
    object.Set("pages", number(env, stats[i].pages));
    object.Set("bytes", number(env, stats[i].bytes));
    object.Set("failed", stats[i].failed.empty() ? env.Null() : Napi::String::New(env, stats[i].failed));
    array.Set(static_cast<std::uint32_t>(i), object);
  }
  return array;
}

}  // namespace memferry::bind
