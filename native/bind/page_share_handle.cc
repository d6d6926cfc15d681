#include "bind/page_share_handle.h"

#include "bind/js_error.h"
#include "bind/values.h"

namespace memferry::bind {

namespace {

constexpr napi_type_tag kTag = {0x6d66736861726531ULL, 0x91c60d3be2a7f845ULL};

}  // namespace

void PageShareHandle::define(Napi::Env env) {
  const Napi::Function constructor =
      DefineClass(env, "NativeShare",
                  {
                      InstanceMethod<&PageShareHandle::set_budget>("setBudget"),
                      InstanceMethod<&PageShareHandle::stats>("stats"),
                      InstanceMethod<&PageShareHandle::close>("close"),
                  });
  Environment::of(env).page_share_class = Napi::Persistent(constructor);
}

Napi::Value PageShareHandle::open(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    return Environment::of(info.Env()).page_share_class.New({object_of(info[0], "config")});
  });
}

PageShareHandle::PageShareHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<PageShareHandle>(info) {
  guarded(info.Env(), [&] {
    const Napi::Object config = object_of(info[0], "config");
    PageShare::Result opened = PageShare::open(text_of(config.Get("path"), "path"),
                                               fixed_bytes_of<sizeof(ContentKey)>(config.Get("key"), "key"),
                                               count_of(config.Get("budgetBytes"), "budgetBytes"));
    if (opened.outcome == PageShare::Opened::kBusy)
      throw CodedError("SHARE_BUSY", "somebody else writes this share");
    if (opened.outcome == PageShare::Opened::kForeign)
      throw CodedError("SHARE_FOREIGN", "the file is no share of this user's");
    share_ = std::move(opened.share);
    Value().TypeTag(&kTag);
  });
}

std::shared_ptr<PageShare> PageShareHandle::share_of(const Napi::Value& value) {
  if (!value.IsObject() || !value.As<Napi::Object>().CheckTypeTag(&kTag))
    throw std::invalid_argument("expected a share of the addon");
  const PageShareHandle* handle = Unwrap(value.As<Napi::Object>());
  (void)handle->share();
  return handle->share_;
}

PageShare& PageShareHandle::share() const {
  if (!share_) throw CodedError("CLOSED", "the share is closed");
  return *share_;
}

Napi::Value PageShareHandle::set_budget(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    share().set_budget(count_of(info[0], "budgetBytes"));
    return info.Env().Undefined();
  });
}

Napi::Value PageShareHandle::stats(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const PageShareStats stats = share().stats();
    Napi::Object object = Napi::Object::New(env);
    object.Set("pages", number(env, stats.pages));
    object.Set("bytesUsed", number(env, stats.bytes_used));
    object.Set("budgetBytes", number(env, stats.budget_bytes));
    object.Set("memoryBytes", number(env, stats.memory_bytes));
    object.Set("inserted", number(env, stats.inserted));
    object.Set("evicted", number(env, stats.evicted));
    return object;
  });
}

Napi::Value PageShareHandle::close(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    share_.reset();
    return info.Env().Undefined();
  });
}

}  // namespace memferry::bind
