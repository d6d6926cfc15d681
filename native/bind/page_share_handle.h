// NativeShare: a host's page share as its writer has it, as a handle.
//
// Thread: the environment's own.
#pragma once

#include <memory>

#include "bind/environment.h"
#include "bind/node_api.h"
#include "share/page_share.h"

namespace memferry::bind {

class PageShareHandle : public Napi::ObjectWrap<PageShareHandle> {
 public:
  static void define(Napi::Env env);
  // Throws CodedError (SHARE_BUSY, SHARE_FOREIGN).
  static Napi::Value open(const Napi::CallbackInfo& info);
  // Of an open handle. Throws std::invalid_argument, CodedError (CLOSED).
  static std::shared_ptr<PageShare> share_of(const Napi::Value& value);
  explicit PageShareHandle(const Napi::CallbackInfo& info);

 private:
  [[nodiscard]] PageShare& share() const;

  Napi::Value set_budget(const Napi::CallbackInfo& info);
  Napi::Value stats(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);

  std::shared_ptr<PageShare> share_;
};

}  // namespace memferry::bind
