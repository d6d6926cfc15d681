#include "bind/directories.h"

#include "bind/stage_servers.h"
#include "bind/values.h"

namespace memferry::bind {

std::vector<Directory> directories_of(const Napi::Value& value) {
  std::vector<Directory> directories;
  std::vector<StageServer> servers = stage_servers_of(value);
  const Napi::Array array = array_of(value, "directories");
  for (std::uint32_t i = 0; i < array.Length(); ++i) {
    if (servers[i].identity == 0) throw std::invalid_argument("directory.identity: none");
    const Napi::Value member = object_of(array.Get(i), "directory").Get("member");
    directories.push_back(
        {std::move(servers[i]), fixed_bytes_of<sizeof(ImageId)>(member, "directory.member")});
  }
  return directories;
}

Napi::Array flags(Napi::Env env, const std::vector<bool>& values) {
  Napi::Array array = Napi::Array::New(env, values.size());
  for (std::size_t i = 0; i < values.size(); ++i)
    array.Set(static_cast<std::uint32_t>(i), Napi::Boolean::New(env, values[i]));
  return array;
}

}  // namespace memferry::bind
