// NativeSpreader: what brings popular pages into a share, as a handle. An open handle is never collected: like a socket
// it lives until it is closed, or its environment ends.
//
// Thread: the environment's own.
#pragma once

#include <memory>

#include "bind/environment.h"
#include "bind/node_api.h"
#include "spread/page_spreader.h"

namespace memferry::bind {

class SpreaderHandle : public Napi::ObjectWrap<SpreaderHandle>, public Engine {
 public:
  static void define(Napi::Env env);
  static Napi::Value create(const Napi::CallbackInfo& info);
  explicit SpreaderHandle(const Napi::CallbackInfo& info);
  ~SpreaderHandle() override;
  void shut_down() override;

 private:
  Napi::Value set_directories(const Napi::CallbackInfo& info);
  Napi::Value stats(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);

  std::unique_ptr<PageSpreader> spreader_;  // kept after close() for its last figures
  bool open_ = false;
};

}  // namespace memferry::bind
