#include <algorithm>

#include "bind/async_work.h"
#include "bind/engine_handles.h"
#include "bind/stage_servers.h"
#include "bind/values.h"

namespace memferry::bind {

namespace {

constexpr napi_type_tag kTag = {0x6d66726563656976ULL, 0x71c50de83ab9f264ULL};
constexpr std::uint64_t kMaxMissingRuns = 1ULL << 20U;  // 24 MiB of JavaScript objects are enough for anyone

ReceiverConfig config_of(const Napi::Object& config) {
  ReceiverConfig out;
  out.migration = fixed_bytes_of<sizeof(wire::MigrationId)>(config.Get("migration"), "migration");
  out.channels = index_of(config.Get("channels"), "channels");
  out.tokens = rows_of<sizeof(wire::Token)>(config.Get("tokens"), "tokens");
  out.discard_first = flag_of(config.Get("discardFirst"), "discardFirst");
  out.paging_from_start = flag_of(config.Get("pagingFromStart"), "pagingFromStart");
  out.may_page = flag_of(config.Get("mayPage"), "mayPage");
  out.keep_page_hashes = flag_of(config.Get("keepPageHashes"), "keepPageHashes");
  out.recover_timeout = milliseconds_of(config.Get("recoverTimeoutMs"), "recoverTimeoutMs");
  out.loss_grace = milliseconds_of(config.Get("lossGraceMs"), "lossGraceMs");
  if (config.Has("encodings")) {
    const std::uint64_t flags = count_of(config.Get("encodings"), "encodings");
    if ((flags & ~std::uint64_t{wire::kEncodings}) != 0)
      throw std::invalid_argument("encodings: flags of encodings");
    out.encodings = static_cast<std::uint16_t>(flags);
  }
  if (config.Has("bases")) {
    const Napi::Array bases = array_of(config.Get("bases"), "bases");
    for (std::uint32_t i = 0; i < bases.Length(); ++i) {
      const std::string kind = text_of(bases.Get(i), "bases");
      out.bases.push_back(kind == "given"      ? ReceiverConfig::Base::kGiven
                          : kind == "in-place" ? ReceiverConfig::Base::kInPlace
                                               : ReceiverConfig::Base::kNone);
    }
    out.base_key = fixed_bytes_of<sizeof(KeyedHashKey)>(config.Get("baseKey"), "baseKey");
  }
  if (config.Has("baseImages")) {
    const Napi::Array images = array_of(config.Get("baseImages"), "baseImages");
    for (std::uint32_t i = 0; i < images.Length(); ++i) {
      BaseImage& image = out.base_images.emplace_back();
      if (images.Get(i).IsNull()) continue;
      const Napi::Object given = object_of(images.Get(i), "baseImages");
      image.path = text_of(given.Get("path"), "baseImages");
      image.offset_bytes = count_of(given.Get("offsetBytes"), "baseImages");
    }
  }
  if (const Napi::Value known = config.Get("known"); known.IsObject()) {
    const Napi::Object of = known.As<Napi::Object>();
    const std::string share = of.Get("share").IsString() ? text_of(of.Get("share"), "share") : std::string();
    out.known = KnownPages::of_domain(fixed_bytes_of<sizeof(ContentKey)>(of.Get("key"), "key"), share);
  }
  if (!config.Has("servers")) return out;
  out.servers = stage_servers_of(config.Get("servers"));
  out.gather_limit = count_of(config.Get("gatherLimit"), "gatherLimit");
  out.bandwidth = count_of(config.Get("bandwidth"), "bandwidth");
  out.sourceless = flag_of(config.Get("sourceless"), "sourceless");
  return out;
}

Napi::Object stats_object(Napi::Env env, const ReceiverStats& stats) {
  Napi::Object faults = Napi::Object::New(env);
  faults.Set("count", number(env, stats.faults.count));
  faults.Set("p50Us", Napi::Number::New(env, stats.faults.p50_us));
  faults.Set("p99Us", Napi::Number::New(env, stats.faults.p99_us));
  faults.Set("maxUs", Napi::Number::New(env, stats.faults.max_us));
  Napi::Object object = Napi::Object::New(env);
  object.Set("bytesReceived", number(env, stats.bytes_received));
  object.Set("pagesReceived", number(env, stats.pages_received));
  object.Set("pagesZero", number(env, stats.pages_zero));
  object.Set("pagesMissing", number(env, stats.pages_missing));
  object.Set("pagesSuspect", number(env, stats.pages_suspect));
  object.Set("faults", faults);
  object.Set("extraMemoryBytes", number(env, stats.extra_memory_bytes));
  object.Set("pagesGathered", number(env, stats.pages_gathered));
  object.Set("pagesFromBase", number(env, stats.pages_from_base));
  object.Set("pagesKnown", number(env, stats.pages_known));
  object.Set("pagesUnresolved", number(env, stats.pages_unresolved));
  object.Set("baseHashUs", number(env, stats.base_hash_us));
  object.Set("baseProblem", stats.base_problem.empty()
                                ? env.Null()
                                : Napi::Value(Napi::String::New(env, stats.base_problem)));
  object.Set("servers", server_stats(env, stats.servers));
  return object;
}

}  // namespace

void ReceiverHandle::define(Napi::Env env) {
  const Napi::Function constructor =
      DefineClass(env, "NativeReceiver",
                  {
                      InstanceMethod<&ReceiverHandle::seal>("seal"),
                      InstanceMethod<&ReceiverHandle::paging>("paging"),
                      InstanceMethod<&ReceiverHandle::stats>("stats"),
                      InstanceMethod<&ReceiverHandle::missing>("missing"),
                      InstanceMethod<&ReceiverHandle::reach>("reach"),
                      InstanceMethod<&ReceiverHandle::digest>("digest"),
                      InstanceMethod<&ReceiverHandle::acknowledge_loss>("acknowledgeLoss"),
                      InstanceMethod<&ReceiverHandle::base_sampled>("baseSampled"),
                      InstanceMethod<&ReceiverHandle::base_ready>("baseReady"),
                      InstanceMethod<&ReceiverHandle::await_filled>("awaitFilled"),
                      InstanceMethod<&ReceiverHandle::source_rests>("sourceRests"),
                      InstanceMethod<&ReceiverHandle::limit>("limit"),
                      InstanceMethod<&ReceiverHandle::grow>("grow"),
                      InstanceMethod<&ReceiverHandle::close>("close"),
                  });
  Environment::of(env).receiver_class = Napi::Persistent(constructor);
}

Napi::Value ReceiverHandle::create(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    return Environment::of(info.Env()).receiver_class.New({object_of(info[0], "config")});
  });
}

ReceiverHandle::ReceiverHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<ReceiverHandle>(info) {
  const Napi::Env env = info.Env();
  guarded(env, [&] {
    const Napi::Object object = object_of(info[0], "config");
    ReceiverConfig config = config_of(object);
    const Napi::Array regions = array_of(object.Get("regions"), "regions");
    for (std::uint32_t i = 0; i < regions.Length(); ++i) {
      holds_.push_back(RegionHandle::hold_of(regions.Get(i)));
      config.regions.push_back(holds_.back().shared->region_pointer());
    }
    events_ = EventQueue::create(env, function_of(object.Get("onEvent"), "onEvent"), "memferry.receiver");
    config.on_event = [events = events_](const EngineEvent& event) {
      events->post([event](Napi::Env js, const Napi::Function& callback) {
        callback.Call({event_object(js, event)});
      });
    };
    try {
      receiver_ = Receiver::create(std::move(config));
      Environment::of(env).add(this);
    } catch (...) {
      events_->close();
      if (receiver_) receiver_->close();
      throw;
    }
    Value().TypeTag(&kTag);
    open_ = true;
    Ref();
  });
}

ReceiverHandle::~ReceiverHandle() { shut_down(); }

std::shared_ptr<Receiver> ReceiverHandle::receiver_of(const Napi::Value& value) {
  if (!value.IsObject() || !value.As<Napi::Object>().CheckTypeTag(&kTag)) {
    throw std::invalid_argument("expected a receiver of the addon");
  }
  const ReceiverHandle* handle = Unwrap(value.As<Napi::Object>());
  if (!handle->open_) throw CodedError("CLOSED", "the receiver is closed");
  return handle->receiver_;
}

void ReceiverHandle::shut_down() {
  if (!open_) return;
  open_ = false;
  events_->close();
  receiver_->close();
  holds_.clear();
}

Napi::Value ReceiverHandle::seal(const Napi::CallbackInfo& info) {
  return guarded(info.Env(),
                 [&]() -> Napi::Value { return Napi::Boolean::New(info.Env(), open_ && receiver().seal()); });
}

Napi::Value ReceiverHandle::paging(const Napi::CallbackInfo& info) {
  return Napi::Boolean::New(info.Env(), open_ && receiver().paging());
}

Napi::Value ReceiverHandle::stats(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value { return stats_object(info.Env(), receiver().stats()); });
}

Napi::Value ReceiverHandle::missing(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const std::uint64_t max_runs = std::min(count_of(info[0], "maxRuns"), kMaxMissingRuns);
    return run_objects(info.Env(), receiver().missing(static_cast<std::size_t>(max_runs)));
  });
}

Napi::Value ReceiverHandle::reach(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const Napi::Array flags = array_of(info[0], "away");
    std::vector<bool> away(flags.Length());
    for (std::uint32_t i = 0; i < flags.Length(); ++i) away[i] = flag_of(flags.Get(i), "away");
    const Gather::Reach reach = receiver().reach(away);
    Napi::Object object = Napi::Object::New(info.Env());
    object.Set("away", number(info.Env(), reach.away));
    object.Set("unknown", number(info.Env(), reach.unknown));
    return object;
  });
}

Napi::Value ReceiverHandle::digest(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const std::uint32_t region = index_of(info[0], "region");
    return run_async(
        info.Env(), "memferry.digest", [receiver = receiver_, region] { return receiver->digest(region); },
        [](Napi::Env env, Hash128 hash) -> Napi::Value {
          return Napi::String::New(env, hex128(hash.high, hash.low));
        });
  });
}

Napi::Value ReceiverHandle::acknowledge_loss(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    if (open_) receiver().acknowledge_loss();
    return info.Env().Undefined();
  });
}

Napi::Value ReceiverHandle::base_sampled(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    if (open_) receiver().base_sampled(flag_of(info[0], "stays"));
    return info.Env().Undefined();
  });
}

Napi::Value ReceiverHandle::base_ready(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    if (open_) receiver().base_ready();
    return info.Env().Undefined();
  });
}

Napi::Value ReceiverHandle::await_filled(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    if (open_) receiver().await_filled();
    return info.Env().Undefined();
  });
}

Napi::Value ReceiverHandle::source_rests(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    if (open_) receiver().source_rests();
    return info.Env().Undefined();
  });
}

Napi::Value ReceiverHandle::limit(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const std::uint64_t bandwidth = count_of(info[0], "bandwidth");
    const std::uint64_t gather_limit = count_of(info[1], "gatherLimit");
    if (open_) {
      receiver().set_bandwidth(bandwidth);
      receiver().set_gather_limit(gather_limit);
    }
    return info.Env().Undefined();
  });
}

Napi::Value ReceiverHandle::grow(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    if (!open_) throw CodedError("CLOSED", "the receiver is closed");
    receiver().grow(index_of(info[0], "region"), count_of(info[1], "pages"));
    return info.Env().Undefined();
  });
}

Napi::Value ReceiverHandle::close(const Napi::CallbackInfo& info) {
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
