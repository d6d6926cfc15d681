#include "bind/spreader_handle.h"

#include "bind/directories.h"
#include "bind/js_error.h"
#include "bind/share_handle.h"
#include "bind/values.h"

namespace memferry::bind {

void SpreaderHandle::define(Napi::Env env) {
  const Napi::Function constructor =
      DefineClass(env, "NativeSpreader",
                  {
                      InstanceMethod<&SpreaderHandle::set_directories>("setDirectories"),
                      InstanceMethod<&SpreaderHandle::stats>("stats"),
                      InstanceMethod<&SpreaderHandle::close>("close"),
                  });
  Environment::of(env).spreader_class = Napi::Persistent(constructor);
}

Napi::Value SpreaderHandle::create(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    return Environment::of(info.Env()).spreader_class.New({object_of(info[0], "config")});
  });
}

SpreaderHandle::SpreaderHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<SpreaderHandle>(info) {
  const Napi::Env env = info.Env();
  guarded(env, [&] {
    const Napi::Object object = object_of(info[0], "config");
    SpreaderConfig config;
    config.share = ShareHandle::share_of(object.Get("share"));
    config.interval = milliseconds_of(object.Get("intervalMs"), "intervalMs");
    config.bandwidth = count_of(object.Get("bandwidth"), "bandwidth");
    spreader_ = std::make_unique<PageSpreader>(std::move(config));
    Environment::of(env).add(this);
    open_ = true;
    Ref();
  });
}

SpreaderHandle::~SpreaderHandle() { shut_down(); }

void SpreaderHandle::shut_down() {
  if (!open_) return;
  open_ = false;
  spreader_->close();
}

Napi::Value SpreaderHandle::set_directories(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    if (!open_) throw CodedError("CLOSED", "the spreader is closed");
    spreader_->set_directories(directories_of(info[0]));
    return info.Env().Undefined();
  });
}

Napi::Value SpreaderHandle::stats(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const SpreaderStats stats = spreader_->stats();
    Napi::Object object = Napi::Object::New(env);
    object.Set("rounds", number(env, stats.rounds));
    object.Set("pagesPopular", number(env, stats.popular));
    object.Set("pagesHeld", number(env, stats.held));
    object.Set("pagesFetched", number(env, stats.fetched));
    object.Set("pagesRefused", number(env, stats.refused));
    object.Set("bytesOnWire", number(env, stats.bytes));
    object.Set("lost", flags(env, spreader_->lost()));
    return object;
  });
}

Napi::Value SpreaderHandle::close(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    if (open_) {
      Environment::of(info.Env()).remove(this);
      shut_down();
      Unref();
    }
    return info.Env().Undefined();
  });
}

}  // namespace memferry::bind
