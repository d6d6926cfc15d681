#include "bind/share_handle.h"

#include "bind/async_work.h"
#include "bind/values.h"
#include "share/share_fill.h"

namespace memferry::bind {
namespace {

constexpr napi_type_tag kTag = {0x6d66736861726570ULL, 0x3f0c5d2b91a7e684ULL};

ContentDigest digest_of(const Napi::Value& value) {
  return fixed_bytes_of<sizeof(ContentDigest)>(value, "digest");
}

Napi::Object fill_object(Napi::Env env, const ShareFill& filled) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("pages", number(env, filled.pages));
  object.Set("zero", number(env, filled.zero));
  object.Set("inserted", number(env, filled.inserted));
  object.Set("there", number(env, filled.there));
  object.Set("noRoom", number(env, filled.no_room));
  return object;
}

}  // namespace

void ShareHandle::define(Napi::Env env) {
  const Napi::Function constructor = DefineClass(env, "NativeShare",
                                                 {
                                                     InstanceMethod<&ShareHandle::fill>("fill"),
                                                     InstanceMethod<&ShareHandle::holds>("holds"),
                                                     InstanceMethod<&ShareHandle::set_score>("setScore"),
                                                     InstanceMethod<&ShareHandle::remove>("remove"),
                                                     InstanceMethod<&ShareHandle::set_budget>("setBudget"),
                                                     InstanceMethod<&ShareHandle::verify>("verify"),
                                                     InstanceMethod<&ShareHandle::stats>("stats"),
                                                     InstanceMethod<&ShareHandle::close>("close"),
                                                 });
  Environment::of(env).share_class = Napi::Persistent(constructor);
}

Napi::Value ShareHandle::open(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const Napi::Object config = object_of(info[0], "config");
    const std::string path = text_of(config.Get("path"), "path");
    const ContentKey key = fixed_bytes_of<sizeof(ContentKey)>(config.Get("key"), "key");
    PageShare::Result result = PageShare::open(path, key, count_of(config.Get("budgetBytes"), "budgetBytes"));
    if (result.outcome == PageShare::Opened::kBusy) return info.Env().Null();
    if (result.outcome == PageShare::Opened::kForeign)
      throw std::invalid_argument(path + ": a file that is no page share, or not this user's");
    const Napi::Object handle = Environment::of(info.Env()).share_class.New({});
    Unwrap(handle)->share_ = std::move(result.share);
    Environment::of(info.Env()).add(Unwrap(handle));
    Unwrap(handle)->Ref();
    return handle;
  });
}

ShareHandle::ShareHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<ShareHandle>(info) {
  Value().TypeTag(&kTag);
}

ShareHandle::~ShareHandle() { shut_down(); }

std::shared_ptr<PageShare> ShareHandle::share_of(const Napi::Value& value) {
  if (!value.IsObject() || !value.As<Napi::Object>().CheckTypeTag(&kTag)) {
    throw std::invalid_argument("expected a page share of the addon");
  }
  const ShareHandle* handle = Unwrap(value.As<Napi::Object>());
  if (!handle->share_) throw CodedError("CLOSED", "the page share is closed");
  return handle->share_;
}

// Work on the pool holds a reference of its own: the lock on the file goes when that has ended.
void ShareHandle::shut_down() { share_ = nullptr; }

PageShare& ShareHandle::share() const {
  if (!share_) throw CodedError("CLOSED", "the page share is closed");
  return *share_;
}

Napi::Value ShareHandle::fill(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&] {
    (void)share();
    const std::string path = text_of(info[0], "path");
    const std::uint64_t offset = count_of(info[1], "offsetBytes");
    const std::uint64_t bytes = count_of(info[2], "lengthBytes");
    const double score = info[3].ToNumber().DoubleValue();
    return run_async(
        env, "memferry share",
        [share = share_, path, offset, bytes, score] {
          return fill_from_file(*share, path, offset, bytes, score);
        },
        [](Napi::Env js, const ShareFill& filled) -> Napi::Value { return fill_object(js, filled); });
  });
}

Napi::Value ShareHandle::holds(const Napi::CallbackInfo& info) {
  return guarded(info.Env(),
                 [&] { return Napi::Boolean::New(info.Env(), share().holds(digest_of(info[0]))); });
}

Napi::Value ShareHandle::set_score(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const double score = info[1].ToNumber().DoubleValue();
    return Napi::Boolean::New(info.Env(), share().set_score(digest_of(info[0]), score));
  });
}

Napi::Value ShareHandle::remove(const Napi::CallbackInfo& info) {
  return guarded(info.Env(),
                 [&] { return Napi::Boolean::New(info.Env(), share().remove(digest_of(info[0]))); });
}

Napi::Value ShareHandle::set_budget(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&] {
    (void)share();
    const std::uint64_t bytes = count_of(info[0], "budgetBytes");
    return run_async(
        env, "memferry share",
        [share = share_, bytes] {
          share->set_budget(bytes);
          return true;
        },
        [](Napi::Env js, bool) { return js.Undefined(); });
  });
}

Napi::Value ShareHandle::verify(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&] {
    (void)share();
    const auto most = static_cast<std::size_t>(count_of(info[0], "mostPages"));
    return run_async(
        env, "memferry share", [share = share_, most] { return share->verify(most); },
        [](Napi::Env js, bool more) -> Napi::Value { return Napi::Boolean::New(js, more); });
  });
}

Napi::Value ShareHandle::stats(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const PageShareStats stats = share().stats();
    Napi::Object object = Napi::Object::New(info.Env());
    object.Set("pages", number(info.Env(), stats.pages));
    object.Set("bytesUsed", number(info.Env(), stats.bytes_used));
    object.Set("budgetBytes", number(info.Env(), stats.budget_bytes));
    object.Set("memoryBytes", number(info.Env(), stats.memory_bytes));
    object.Set("inserted", number(info.Env(), stats.inserted));
    object.Set("evicted", number(info.Env(), stats.evicted));
    object.Set("refused", number(info.Env(), stats.refused));
    object.Set("unverified", number(info.Env(), stats.unverified));
    object.Set("dropped", number(info.Env(), stats.dropped));
    return object;
  });
}

Napi::Value ShareHandle::close(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    if (share_) {
      Environment::of(info.Env()).remove(this);
      shut_down();
      Unref();
    }
    return info.Env().Undefined();
  });
}

}  // namespace memferry::bind
