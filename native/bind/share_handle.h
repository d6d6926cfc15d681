// NativeShare: the writer of a page share as a handle. An open handle is never collected: it holds the file's lock until
// it is closed, or its environment ends.
//
// Thread: the environment's own; what takes long runs on the pool.
#pragma once

#include <memory>

#include "bind/environment.h"
#include "bind/node_api.h"
#include "share/page_share.h"

namespace memferry::bind {

class ShareHandle : public Napi::ObjectWrap<ShareHandle>, public Engine {
 public:
  static void define(Napi::Env env);
  // null: somebody else writes it. Throws INVALID_ARGUMENT for a file of something else.
  static Napi::Value open(const Napi::CallbackInfo& info);
  // For native code that finds pages itself.
  static std::shared_ptr<PageShare> share_of(const Napi::Value& value);
  explicit ShareHandle(const Napi::CallbackInfo& info);
  ~ShareHandle() override;
  void shut_down() override;

 private:
  [[nodiscard]] PageShare& share() const;  // throws CodedError (CLOSED)

  Napi::Value fill(const Napi::CallbackInfo& info);
  Napi::Value holds(const Napi::CallbackInfo& info);
  Napi::Value set_score(const Napi::CallbackInfo& info);
  Napi::Value remove(const Napi::CallbackInfo& info);
  Napi::Value set_budget(const Napi::CallbackInfo& info);
  Napi::Value verify(const Napi::CallbackInfo& info);
  Napi::Value stats(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);

  std::shared_ptr<PageShare> share_;
};

}  // namespace memferry::bind
