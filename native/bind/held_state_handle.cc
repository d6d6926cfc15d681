#include "bind/held_state_handle.h"

#include <stdexcept>
#include <utility>

#include "bind/environment.h"
#include "bind/js_error.h"
#include "bind/values.h"

namespace memferry::bind {

namespace {

constexpr napi_type_tag kTag = {0x6d6673746174650aULL, 0x51d20c9be47a8f36ULL};

}  // namespace

void HeldStateHandle::define(Napi::Env env) {
  const Napi::Function constructor = DefineClass(env, "NativeHeldState",
                                                 {
                                                     InstanceMethod<&HeldStateHandle::size>("size"),
                                                     InstanceMethod<&HeldStateHandle::write>("write"),
                                                     InstanceMethod<&HeldStateHandle::read>("read"),
                                                     InstanceMethod<&HeldStateHandle::release>("release"),
                                                 });
  Environment::of(env).held_state_class = Napi::Persistent(constructor);
}

HeldStateHandle::HeldStateHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<HeldStateHandle>(info) {
  Value().TypeTag(&kTag);
}

HeldStateHandle& HeldStateHandle::make(Napi::Env env) {
  return *Unwrap(Environment::of(env).held_state_class.New({}));
}

Napi::Value HeldStateHandle::of(Napi::Env env, std::shared_ptr<const HeldState> state) {
  if (!state) return env.Null();
  HeldStateHandle& handle = make(env);
  handle.state_ = std::move(state);
  return handle.Value();
}

Napi::Value HeldStateHandle::writable(Napi::Env env, std::shared_ptr<HeldState> state) {
  if (!state) return env.Null();
  HeldStateHandle& handle = make(env);
  handle.state_ = state;
  handle.written_ = std::move(state);
  return handle.Value();
}

std::shared_ptr<const HeldState> HeldStateHandle::state_of(const Napi::Value& value) {
  if (!value.IsObject() || !value.As<Napi::Object>().CheckTypeTag(&kTag))
    throw std::invalid_argument("expected a state of this stage");
  HeldStateHandle& handle = *Unwrap(value.As<Napi::Object>());
  if (!handle.state_) throw std::invalid_argument("a state that was released");
  // It is final now.
  handle.written_.reset();
  return handle.state_;
}

Napi::Value HeldStateHandle::size(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] { return number(info.Env(), state_ ? state_->size() : 0); });
}

Napi::Value HeldStateHandle::write(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    if (!written_) throw std::invalid_argument("a state that is not to be written");
    written_->write(count_of(info[0], "at"), bytes_of(info[1], "bytes"));
    return info.Env().Undefined();
  });
}

Napi::Value HeldStateHandle::read(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    if (!state_) throw std::invalid_argument("a state that was released");
    const std::uint64_t at = count_of(info[0], "at");
    const std::uint64_t length = count_of(info[1], "length");
    if (at > state_->size() || length > state_->size() - at)
      throw std::invalid_argument("outside of the state");
    Napi::Uint8Array out = Napi::Uint8Array::New(info.Env(), static_cast<std::size_t>(length));
    state_->read(at, std::as_writable_bytes(std::span(out.Data(), out.ByteLength())));
    return out;
  });
}

Napi::Value HeldStateHandle::release(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    state_.reset();
    written_.reset();
    return info.Env().Undefined();
  });
}

}  // namespace memferry::bind
