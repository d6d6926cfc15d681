#include "bind/stage_handle.h"

#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "bind/async_work.h"
#include "bind/held_state_handle.h"
#include "bind/js_error.h"
#include "bind/values.h"

namespace memferry::bind {

namespace {

constexpr napi_type_tag kTag = {0x6d66737461676531ULL, 0x2b94e07c5d13f68aULL};

ImageId image_of(const Napi::Value& value) { return fixed_bytes_of<sizeof(ImageId)>(value, "image"); }

template <typename Integer>
Integer small_of(const Napi::Value& value, const char* what) {
  const std::uint64_t count = count_of(value, what);
  if (count > std::numeric_limits<Integer>::max()) {
    throw std::invalid_argument(std::string(what) + ": out of range");
  }
  return static_cast<Integer>(count);
}

std::vector<std::uint64_t> counts_of(const Napi::Value& value, const char* what) {
  const Napi::Array array = array_of(value, what);
  std::vector<std::uint64_t> counts;
  for (std::uint32_t i = 0; i < array.Length(); ++i) counts.push_back(count_of(array.Get(i), what));
  return counts;
}

}  // namespace

void StageHandle::define(Napi::Env env) {
  const Napi::Function constructor =
      DefineClass(env, "NativeStage",
                  {
                      InstanceMethod<&StageHandle::preallocate>("preallocate"),
                      InstanceMethod<&StageHandle::limit_fresh>("limitFresh"),
                      InstanceMethod<&StageHandle::identity>("identity"),
                      InstanceMethod<&StageHandle::create_image>("createImage"),
                      InstanceMethod<&StageHandle::join>("join"),
                      InstanceMethod<&StageHandle::add_session>("addSession"),
                      InstanceMethod<&StageHandle::remove_session>("removeSession"),
                      InstanceMethod<&StageHandle::set_chain>("setChain"),
                      InstanceMethod<&StageHandle::make_state>("makeState"),
                      InstanceMethod<&StageHandle::put_state>("putState"),
                      InstanceMethod<&StageHandle::state>("state"),
                      InstanceMethod<&StageHandle::seal>("seal"),
                      InstanceMethod<&StageHandle::drop>("drop"),
                      InstanceMethod<&StageHandle::image>("image"),
                      InstanceMethod<&StageHandle::whole>("whole"),
                      InstanceMethod<&StageHandle::stats>("stats"),
                      InstanceMethod<&StageHandle::close>("close"),
                  });
  Environment::of(env).stage_class = Napi::Persistent(constructor);
}

Napi::Value StageHandle::create(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    return Environment::of(info.Env()).stage_class.New({object_of(info[0], "config")});
  });
}

StageHandle::StageHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<StageHandle>(info) {
  const Napi::Env env = info.Env();
  guarded(env, [&] {
    const Napi::Object object = object_of(info[0], "config");
    StageConfig config;
    config.memory_bytes = count_of(object.Get("memoryBytes"), "memoryBytes");
    config.bandwidth = count_of(object.Get("bandwidth"), "bandwidth");
    if (const Napi::Value share = object.Get("popularShare"); !share.IsUndefined())
      config.popular_share = count_of(share, "popularShare");
    if (const Napi::Value period = object.Get("popularPeriodMs"); !period.IsUndefined())
      config.popular_period_ms = count_of(period, "popularPeriodMs");
    stage_ = Stage::create(config);
    Environment::of(env).add(this);
    Value().TypeTag(&kTag);
    open_ = true;
    Ref();
  });
}

StageHandle::~StageHandle() { shut_down(); }

std::shared_ptr<Stage> StageHandle::stage_of(const Napi::Value& value) {
  if (!value.IsObject() || !value.As<Napi::Object>().CheckTypeTag(&kTag)) {
    throw std::invalid_argument("expected a stage of the addon");
  }
  const StageHandle* handle = Unwrap(value.As<Napi::Object>());
  if (!handle->open_) throw CodedError("CLOSED", "the stage is closed");
  return handle->stage_;
}

void StageHandle::shut_down() {
  if (!open_) return;
  open_ = false;
  stage_->close();
}

Stage& StageHandle::stage() const {
  if (!open_) throw CodedError("CLOSED", "the stage is closed");
  return *stage_;
}

Napi::Value StageHandle::preallocate(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&] {
    (void)stage();
    return run_async(
        env, "memferry preallocate",
        [stage = stage_] {
          stage->preallocate();
          return true;
        },
        [](Napi::Env js, bool) { return js.Undefined(); });
  });
}

Napi::Value StageHandle::limit_fresh(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    stage().limit_fresh(count_of(info[0], "bytes"));
    return info.Env().Undefined();
  });
}

Napi::Value StageHandle::identity(const Napi::CallbackInfo& info) {
  return guarded(info.Env(),
                 [&] { return Napi::String::New(info.Env(), hex128(stage().identity(), 0).substr(0, 16)); });
}

Napi::Value StageHandle::create_image(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    ImageConfig config;
    config.id = image_of(info[0]);
    config.region_pages = counts_of(info[1], "regionPages");
    config.ordinal = small_of<std::uint8_t>(info[2], "ordinal");
    if (info[3].IsTypedArray()) config.domain = fixed_bytes_of<sizeof(DomainKey)>(info[3], "domainKey");
    return Napi::Boolean::New(info.Env(), stage().create_image(config));
  });
}

Napi::Value StageHandle::join(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    MemberConfig config;
    config.id = fixed_bytes_of<sizeof(ImageId)>(info[0], "member");
    config.domain = fixed_bytes_of<sizeof(DomainKey)>(info[1], "domainKey");
    if (info[2].IsTypedArray()) config.guest = fixed_bytes_of<sizeof(MemberGuest)>(info[2], "guest");
    return Napi::Boolean::New(info.Env(), stage().join(config));
  });
}

Napi::Value StageHandle::add_session(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const bool known =
        stage().add_session(image_of(info[0]), small_of<std::uint16_t>(info[1], "session"),
                            index_of(info[2], "roles"), rows_of<sizeof(wire::Token)>(info[3], "tokens"));
    return Napi::Boolean::New(info.Env(), known);
  });
}

Napi::Value StageHandle::remove_session(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const bool known = stage().remove_session(image_of(info[0]), small_of<std::uint16_t>(info[1], "session"));
    return Napi::Boolean::New(info.Env(), known);
  });
}

Napi::Value StageHandle::set_chain(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const auto port = small_of<std::uint16_t>(info[3], "port");
    if (port == 0) throw std::invalid_argument("port: not a port");
    const bool known =
        stage().set_chain(image_of(info[0]), small_of<std::uint8_t>(info[1], "ordinal"),
                          text_of(info[2], "host"), port, rows_of<sizeof(wire::Token)>(info[4], "tokens"));
    return Napi::Boolean::New(info.Env(), known);
  });
}

Napi::Value StageHandle::make_state(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    return HeldStateHandle::writable(info.Env(), stage().make_state(count_of(info[0], "bytes")));
  });
}

Napi::Value StageHandle::put_state(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    return Napi::Boolean::New(info.Env(),
                              stage().put_state(image_of(info[0]), HeldStateHandle::state_of(info[1])));
  });
}

Napi::Value StageHandle::state(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    return HeldStateHandle::of(info.Env(), stage().state(image_of(info[0])));
  });
}

Napi::Value StageHandle::seal(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] { return Napi::Boolean::New(info.Env(), stage().seal(image_of(info[0]))); });
}

Napi::Value StageHandle::drop(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    std::function<void()> give_back = stage().take_out(image_of(info[0]));
    if (!give_back) return env.Null();
    // Of tens of GiB it takes seconds, in which nobody else is to wait for this thread.
    return run_async(
        env, "memferry drop",
        [stage = stage_, give_back = std::move(give_back)] {
          give_back();
          return true;
        },
        [](Napi::Env js, bool) { return js.Undefined(); });
  });
}

Napi::Value StageHandle::image(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const auto stats = stage().image(image_of(info[0]));
    if (!stats) return env.Null();
    Napi::Object object = Napi::Object::New(env);
    object.Set("pagesHeld", number(env, stats->pages_held));
    object.Set("pagesShared", number(env, stats->pages_shared));
    object.Set("pagesZero", number(env, stats->pages_zero));
    object.Set("pagesKnown", number(env, stats->pages_known));
    object.Set("bytes", number(env, stats->bytes));
    object.Set("bytesIn", number(env, stats->bytes_in));
    object.Set("bytesOut", number(env, stats->bytes_out));
    object.Set("sealed", Napi::Boolean::New(env, stats->sealed));
    return object;
  });
}

Napi::Value StageHandle::whole(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const auto whole = stage().whole(image_of(info[0]), counts_of(info[1], "regionPages"));
    if (!whole) return info.Env().Null();
    return Napi::Boolean::New(info.Env(), *whole);
  });
}

// Also after close(): the last figures.
Napi::Value StageHandle::stats(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const StageStats stats = stage_->stats();
    Napi::Object object = Napi::Object::New(env);
    object.Set("memoryBytes", number(env, stats.memory_bytes));
    object.Set("slabBytes", number(env, stats.slab_bytes));
    object.Set("freeBytes", number(env, stats.free_bytes));
    object.Set("images", number(env, stats.images));
    object.Set("connections", number(env, stats.connections));
    object.Set("bytesIn", number(env, stats.bytes_in));
    object.Set("bytesOut", number(env, stats.bytes_out));
    object.Set("sharedPages", number(env, stats.shared_pages));
    object.Set("hintBytes", number(env, stats.hint_bytes));
    object.Set("members", number(env, stats.members));
    object.Set("popularNames", number(env, stats.popular_names));
    object.Set("popularPages", number(env, stats.popular_pages));
    return object;
  });
}

Napi::Value StageHandle::close(const Napi::CallbackInfo& info) {
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
