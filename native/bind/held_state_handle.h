// NativeHeldState: memory of a stage for an execution state, written or read in pieces, as a handle. The memory is the
// stage's again when neither an image nor a handle has it; `release()` lets go without waiting for a collection.
//
// Thread: the environment's own.
#pragma once

#include <memory>

#include "bind/node_api.h"
#include "stage/held_state.h"

namespace memferry::bind {

class HeldStateHandle : public Napi::ObjectWrap<HeldStateHandle> {
 public:
  static void define(Napi::Env env);
  // null for nullptr.
  static Napi::Value of(Napi::Env env, std::shared_ptr<const HeldState> state);
  static Napi::Value writable(Napi::Env env, std::shared_ptr<HeldState> state);
  // Throws std::invalid_argument: no handle, or one that was released.
  static std::shared_ptr<const HeldState> state_of(const Napi::Value& value);

  explicit HeldStateHandle(const Napi::CallbackInfo& info);

 private:
  static HeldStateHandle& make(Napi::Env env);

  Napi::Value size(const Napi::CallbackInfo& info);
  Napi::Value write(const Napi::CallbackInfo& info);
  Napi::Value read(const Napi::CallbackInfo& info);
  Napi::Value release(const Napi::CallbackInfo& info);

  std::shared_ptr<const HeldState> state_;
  std::shared_ptr<HeldState> written_;  // the same, of one that is to be written
};

}  // namespace memferry::bind
