#include "bind/sampler_handle.h"

#include "bind/directories.h"
#include "bind/js_error.h"
#include "bind/region_handle.h"
#include "bind/values.h"

namespace memferry::bind {

void SamplerHandle::define(Napi::Env env) {
  const Napi::Function constructor =
      DefineClass(env, "NativeSampler",
                  {
                      InstanceMethod<&SamplerHandle::set_directories>("setDirectories"),
                      InstanceMethod<&SamplerHandle::stats>("stats"),
                      InstanceMethod<&SamplerHandle::close>("close"),
                  });
  Environment::of(env).sampler_class = Napi::Persistent(constructor);
}

Napi::Value SamplerHandle::create(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    return Environment::of(info.Env()).sampler_class.New({object_of(info[0], "config")});
  });
}

SamplerHandle::SamplerHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<SamplerHandle>(info) {
  const Napi::Env env = info.Env();
  guarded(env, [&] {
    const Napi::Object object = object_of(info[0], "config");
    SamplerConfig config;
    const Napi::Array regions = array_of(object.Get("regions"), "regions");
    for (std::uint32_t i = 0; i < regions.Length(); ++i) {
      config.regions.push_back(RegionHandle::hold_of(regions.Get(i)).shared->region_pointer());
    }
    config.key = fixed_bytes_of<sizeof(ContentKey)>(object.Get("domainKey"), "domainKey");
    const Napi::Value share = object.Get("cpuShare");
    if (!share.IsNumber()) throw std::invalid_argument("cpuShare: not a number");
    config.cpu_share = share.As<Napi::Number>().DoubleValue();
    config.pass_interval = milliseconds_of(object.Get("passIntervalMs"), "passIntervalMs");
    config.most_pages = count_of(object.Get("mostPages"), "mostPages");
    reporter_ = std::make_shared<DirectoryReporter>();
    config.reporter = reporter_;
    sampler_ = std::make_unique<PageSampler>(std::move(config));
    Environment::of(env).add(this);
    open_ = true;
    Ref();
  });
}

SamplerHandle::~SamplerHandle() { shut_down(); }

void SamplerHandle::shut_down() {
  if (!open_) return;
  open_ = false;
  sampler_->close();
  reporter_->close();
}

Napi::Value SamplerHandle::set_directories(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    if (!open_) throw CodedError("CLOSED", "the sampler is closed");
    reporter_->set_directories(directories_of(info[0]));
    return info.Env().Undefined();
  });
}

Napi::Value SamplerHandle::stats(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const SamplerStats stats = sampler_->stats();
    Napi::Object object = Napi::Object::New(env);
    object.Set("passes", number(env, stats.passes));
    object.Set("pagesHashed", number(env, stats.hashed));
    object.Set("pagesZero", number(env, stats.zeros));
    object.Set("pagesReported", number(env, stats.reported));
    object.Set("pagesWanted", number(env, stats.wanted));
    object.Set("pagesGiven", number(env, stats.given));
    object.Set("lookedAway", number(env, stats.looked_away));
    object.Set("cpuMs", Napi::Number::New(env, static_cast<double>(stats.cpu_ns) / 1e6));
    object.Set("memoryBytes", number(env, stats.memory_bytes));
    object.Set("bytesOnWire", number(env, reporter_->bytes()));
    object.Set("lost", flags(env, reporter_->lost()));
    return object;
  });
}

Napi::Value SamplerHandle::close(const Napi::CallbackInfo& info) {
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
