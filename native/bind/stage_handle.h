// NativeStage: a VMD server's memory and data path as a handle. An open handle is never collected: like a socket it
// lives until it is closed, or its environment ends.
//
// Thread: the environment's own.
#pragma once

#include <memory>

#include "bind/environment.h"
#include "bind/node_api.h"
#include "stage/stage.h"

namespace memferry::bind {

class StageHandle : public Napi::ObjectWrap<StageHandle>, public Engine {
 public:
  static void define(Napi::Env env);
  static Napi::Value create(const Napi::CallbackInfo& info);
  static std::shared_ptr<Stage> stage_of(const Napi::Value& value);
  explicit StageHandle(const Napi::CallbackInfo& info);
  ~StageHandle() override;
  void shut_down() override;

 private:
  [[nodiscard]] Stage& stage() const;  // throws CodedError (CLOSED)

  Napi::Value preallocate(const Napi::CallbackInfo& info);
  Napi::Value limit_fresh(const Napi::CallbackInfo& info);
  Napi::Value identity(const Napi::CallbackInfo& info);
  Napi::Value create_image(const Napi::CallbackInfo& info);
  Napi::Value join(const Napi::CallbackInfo& info);
  Napi::Value add_session(const Napi::CallbackInfo& info);
  Napi::Value remove_session(const Napi::CallbackInfo& info);
  Napi::Value set_chain(const Napi::CallbackInfo& info);
  Napi::Value make_state(const Napi::CallbackInfo& info);
  Napi::Value put_state(const Napi::CallbackInfo& info);
  Napi::Value state(const Napi::CallbackInfo& info);
  Napi::Value seal(const Napi::CallbackInfo& info);
  Napi::Value drop(const Napi::CallbackInfo& info);
  Napi::Value image(const Napi::CallbackInfo& info);
  Napi::Value whole(const Napi::CallbackInfo& info);
  Napi::Value stats(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);

  std::shared_ptr<Stage> stage_;  // kept after close() for its last figures
  bool open_ = false;
};

}  // namespace memferry::bind
