#include "bind/stage_servers.h"

#include <charconv>
#include <limits>
#include <string>

namespace memferry::bind {

namespace {

// 16 hex digits.
std::uint64_t identity_of(const std::string& digits) {
  std::uint64_t identity = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), identity, 16);
  if (error != std::errc() || end != digits.data() + digits.size() || digits.size() != 16) {
    throw std::invalid_argument("server.identity: not 16 hex digits");
  }
  return identity;
}

}  // namespace

std::vector<StageServer> stage_servers_of(const Napi::Value& value) {
  std::vector<StageServer> servers;
  const Napi::Array array = array_of(value, "servers");
  for (std::uint32_t i = 0; i < array.Length(); ++i) {
    const Napi::Object object = object_of(array.Get(i), "server");
    StageServer server;
    server.name = text_of(object.Get("name"), "server.name");
    server.host = text_of(object.Get("host"), "server.host");
    const std::uint32_t port = index_of(object.Get("port"), "server.port");
    const std::uint32_t session = index_of(object.Get("session"), "server.session");
    if (port == 0 || port > std::numeric_limits<std::uint16_t>::max() ||
        session > std::numeric_limits<std::uint16_t>::max()) {
      throw std::invalid_argument("server: port or session out of range");
    }
    server.port = static_cast<std::uint16_t>(port);
    server.session = static_cast<std::uint16_t>(session);
    server.tokens = rows_of<sizeof(wire::Token)>(object.Get("tokens"), "server.tokens");
    if (const Napi::Value identity = object.Get("identity"); identity.IsString()) {
      server.identity = identity_of(identity.As<Napi::String>().Utf8Value());
    }
    servers.push_back(std::move(server));
  }
  return servers;
}

}  // namespace memferry::bind
