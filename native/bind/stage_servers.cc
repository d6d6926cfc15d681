#include "bind/stage_servers.h"

#include <limits>

namespace memferry::bind {

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
    servers.push_back(std::move(server));
  }
  return servers;
}

}  // namespace memferry::bind
