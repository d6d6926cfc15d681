#include <algorithm>
#include <functional>
#include <limits>

#include "bind/async_work.h"
#include "bind/engine_handles.h"
#include "bind/stage_servers.h"
#include "bind/values.h"

namespace memferry::bind {

namespace {

wire::Compress compress_of(const std::string& choice) {
  if (choice == "auto") return wire::Compress::kAuto;
  if (choice == "lz4") return wire::Compress::kLz4;
  if (choice == "zstd") return wire::Compress::kZstd;
  if (choice == "off") return wire::Compress::kOff;
  throw std::invalid_argument("compress: auto, lz4, zstd or off");
}

CompareDepth depth_of(const std::string& choice) {
  if (choice == "all") return CompareDepth::kAll;
  if (choice == "sample") return CompareDepth::kSample;
  if (choice == "estimate") return CompareDepth::kEstimate;
  throw std::invalid_argument("depth: all, sample or estimate");
}

std::uint16_t encodings_of(const Napi::Value& value, const char* what) {
  const std::uint64_t flags = count_of(value, what);
  if ((flags & ~std::uint64_t{wire::kEncodings}) != 0)
    throw std::invalid_argument(std::string(what) + ": flags of encodings");
  return static_cast<std::uint16_t>(flags);
}

Napi::Object encoding_stats(Napi::Env env, const EncodingStats& stats) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("pages", number(env, stats.pages));
  object.Set("rawBytes", number(env, stats.raw_bytes));
  object.Set("encodedBytes", number(env, stats.encoded_bytes));
  object.Set("cpuMs", Napi::Number::New(env, static_cast<double>(stats.cpu_ns) / 1e6));
  return object;
}

SenderConfig config_of(const Napi::Object& config) {
  SenderConfig out;
  out.host = text_of(config.Get("host"), "host");
  const std::uint64_t port = count_of(config.Get("port"), "port");
  const bool direct = !config.Has("direct") || flag_of(config.Get("direct"), "direct");
  if ((port == 0 && direct) || port > std::numeric_limits<std::uint16_t>::max())
    throw std::invalid_argument("port: not a port");
  out.port = static_cast<std::uint16_t>(port);
  out.migration = fixed_bytes_of<sizeof(wire::MigrationId)>(config.Get("migration"), "migration");
  out.channels = index_of(config.Get("channels"), "channels");
  out.tokens = rows_of<sizeof(wire::Token)>(config.Get("tokens"), "tokens");
  out.bandwidth = count_of(config.Get("bandwidth"), "bandwidth");
  out.connect_timeout = milliseconds_of(config.Get("connectTimeoutMs"), "connectTimeoutMs");
  out.recover_timeout = milliseconds_of(config.Get("recoverTimeoutMs"), "recoverTimeoutMs");
  if (config.Has("compress")) {
    out.compress = compress_of(text_of(config.Get("compress"), "compress"));
    out.destination_encodings = encodings_of(config.Get("destinationEncodings"), "destinationEncodings");
    out.server_encodings = encodings_of(config.Get("serverEncodings"), "serverEncodings");
    out.delta_cache_bytes = count_of(config.Get("deltaCacheBytes"), "deltaCacheBytes");
  }
  if (config.Has("toldPages")) {
    const Napi::Array pages = array_of(config.Get("toldPages"), "toldPages");
    for (std::uint32_t i = 0; i < pages.Length(); ++i)
      out.told_pages.push_back(count_of(pages.Get(i), "toldPages"));
  }
  if (config.Has("basePages")) {
    const Napi::Array pages = array_of(config.Get("basePages"), "basePages");
    for (std::uint32_t i = 0; i < pages.Length(); ++i)
      out.base_pages.push_back(count_of(pages.Get(i), "basePages"));
    out.base_key = fixed_bytes_of<sizeof(KeyedHashKey)>(config.Get("baseKey"), "baseKey");
  }
  if (!config.Has("servers")) return out;
  out.servers = stage_servers_of(config.Get("servers"));
  out.replicas = index_of(config.Get("replicas"), "replicas");
  out.direct = flag_of(config.Get("direct"), "direct");
  out.stall_timeout = milliseconds_of(config.Get("stallTimeoutMs"), "stallTimeoutMs");
  out.release_as_evicted = flag_of(config.Get("releaseAsEvicted"), "releaseAsEvicted");
  const Napi::Value dedup_key = config.Get("dedupKey");
  if (dedup_key.IsTypedArray()) out.dedup = fixed_bytes_of<sizeof(ContentKey)>(dedup_key, "dedupKey");
  const Napi::Value references_key = config.Get("referencesKey");
  if (references_key.IsTypedArray())
    out.references = fixed_bytes_of<sizeof(ContentKey)>(references_key, "referencesKey");
  return out;
}

Napi::Value dedup_object(Napi::Env env, const DedupStats& stats) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("pages", number(env, stats.pages));
  object.Set("refused", number(env, stats.refused));
  object.Set("examined", number(env, stats.examined));
  object.Set("probes", number(env, stats.probes));
  object.Set("overheadBytes", number(env, stats.overhead_bytes));
  object.Set("hashMs", Napi::Number::New(env, static_cast<double>(stats.hash_ns) / 1e6));
  const bool known = stats.link_bytes_per_second > 0;
  object.Set("linkBytesPerSecond", known ? Napi::Number::New(env, stats.link_bytes_per_second) : env.Null());
  return object;
}

}  // namespace

void SenderHandle::define(Napi::Env env) {
  const Napi::Function constructor =
      DefineClass(env, "NativeSender",
                  {
                      InstanceMethod<&SenderHandle::connect>("connect"),
                      InstanceMethod<&SenderHandle::queue_populated>("queuePopulated"),
                      InstanceMethod<&SenderHandle::queue_dirty>("queueDirty"),
                      InstanceMethod<&SenderHandle::queue_dirty_sync>("queueDirtySync"),
                      InstanceMethod<&SenderHandle::start_round>("startRound"),
                      InstanceMethod<&SenderHandle::probe>("probe"),
                      InstanceMethod<&SenderHandle::told_growth>("toldGrowth"),
                      InstanceMethod<&SenderHandle::compare_base>("compareBase"),
                      InstanceMethod<&SenderHandle::end_base>("endBase"),
                      InstanceMethod<&SenderHandle::discard_dirty>("discardDirty"),
                      InstanceMethod<&SenderHandle::switch_over>("switchOver"),
                      InstanceMethod<&SenderHandle::start_push>("startPush"),
                      InstanceMethod<&SenderHandle::hold_eviction>("holdEviction"),
                      InstanceMethod<&SenderHandle::give_up_server>("giveUpServer"),
                      InstanceMethod<&SenderHandle::set_bandwidth>("setBandwidth"),
                      InstanceMethod<&SenderHandle::stats>("stats"),
                      InstanceMethod<&SenderHandle::digest>("digest"),
                      InstanceMethod<&SenderHandle::close>("close"),
                  });
  Environment::of(env).sender_class = Napi::Persistent(constructor);
}

Napi::Value SenderHandle::create(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    return Environment::of(info.Env()).sender_class.New({object_of(info[0], "config")});
  });
}

SenderHandle::SenderHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<SenderHandle>(info) {
  const Napi::Env env = info.Env();
  guarded(env, [&] {
    const Napi::Object object = object_of(info[0], "config");
    SenderConfig config = config_of(object);
    const Napi::Array regions = array_of(object.Get("regions"), "regions");
    const Napi::Array trackers = array_of(object.Get("trackers"), "trackers");
    if (trackers.Length() != regions.Length())
      throw std::invalid_argument("trackers: one (or null) a region");
    auto core = std::make_shared<Core>();
    for (std::uint32_t i = 0; i < regions.Length(); ++i) {
      holds_.push_back(RegionHandle::hold_of(regions.Get(i)));
      config.regions.push_back(holds_.back().shared->region_pointer());
      LentTracker lent = TrackerHandle::lend(trackers.Get(i));
      config.trackers.push_back(std::move(lent.tracker));
      if (lent.turn) core->turns.push_back(std::move(lent.turn));
    }
    // Two senders that share trackers lock them in one order, and each only once.
    std::sort(core->turns.begin(), core->turns.end());
    core->turns.erase(std::unique(core->turns.begin(), core->turns.end()), core->turns.end());
    events_ = EventQueue::create(env, function_of(object.Get("onEvent"), "onEvent"), "memferry.sender");
    config.on_event = [events = events_](const EngineEvent& event) {
      events->post([event](Napi::Env js, const Napi::Function& callback) {
        callback.Call({event_object(js, event)});
      });
    };
    try {
      core->sender = std::make_unique<Sender>(std::move(config));
      Environment::of(env).add(this);
    } catch (...) {
      events_->close();
      throw;
    }
    core_ = std::move(core);
    open_ = true;
    Ref();
  });
}

SenderHandle::~SenderHandle() { shut_down(); }

std::vector<std::unique_lock<std::mutex>> SenderHandle::Core::take_turns() const {
  std::vector<std::unique_lock<std::mutex>> locks;
  locks.reserve(turns.size());
  for (const auto& turn : turns) locks.emplace_back(*turn);
  return locks;
}

void SenderHandle::end(bool goodbye) {
  if (!open_) return;
  open_ = false;
  events_->close();
  core_->sender->close(goodbye);
  holds_.clear();
}

void SenderHandle::shut_down() { end(false); }

const std::shared_ptr<SenderHandle::Core>& SenderHandle::core() const {
  if (!open_) throw CodedError("CLOSED", "the sender is closed");
  return core_;
}

Napi::Value SenderHandle::connect(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    core()->sender->connect();
    return info.Env().Undefined();
  });
}

Napi::Value SenderHandle::queue_populated(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    return run_async(
        info.Env(), "memferry.queuePopulated",
        [core = core(), holds = holds_] {
          const auto turns = core->take_turns();
          core->sender->queue_populated();
          return true;
        },
        [](Napi::Env env, bool) -> Napi::Value { return env.Undefined(); });
  });
}

Napi::Value SenderHandle::queue_dirty(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    return run_async(
        info.Env(), "memferry.queueDirty",
        [core = core(), holds = holds_] {
          const auto turns = core->take_turns();
          return core->sender->queue_dirty();
        },
        [](Napi::Env env, std::uint64_t pages) -> Napi::Value { return number(env, pages); });
  });
}

Napi::Value SenderHandle::queue_dirty_sync(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const auto turns = core()->take_turns();
    return number(info.Env(), core()->sender->queue_dirty());
  });
}

Napi::Value SenderHandle::start_round(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    core()->sender->start_round(count_of(info[0], "tag"),
                                info[1].IsUndefined() || flag_of(info[1], "references"));
    return info.Env().Undefined();
  });
}

Napi::Value SenderHandle::probe(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    core()->sender->probe(count_of(info[0], "tag"), count_of(info[1], "bytes"));
    return info.Env().Undefined();
  });
}

Napi::Value SenderHandle::told_growth(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    core()->sender->told_growth(index_of(info[0], "region"), count_of(info[1], "pages"));
    return info.Env().Undefined();
  });
}

Napi::Value SenderHandle::compare_base(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    core()->sender->compare_base(count_of(info[0], "tag"), count_of(info[1], "mostNodes"),
                                 depth_of(text_of(info[2], "depth")));
    return info.Env().Undefined();
  });
}

Napi::Value SenderHandle::end_base(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    core()->sender->end_base(count_of(info[0], "tag"), flag_of(info[1], "drop"));
    return info.Env().Undefined();
  });
}

Napi::Value SenderHandle::discard_dirty(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const std::uint64_t tag = count_of(info[0], "tag");
    return run_async(
        info.Env(), "memferry.discardDirty",
        [core = core(), holds = holds_, tag] {
          const auto turns = core->take_turns();
          return core->sender->discard_dirty(tag);
        },
        [](Napi::Env env, std::uint64_t pages) -> Napi::Value { return number(env, pages); });
  });
}

Napi::Value SenderHandle::switch_over(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const auto turns = core()->take_turns();
    return number(info.Env(), core()->sender->switch_over());
  });
}

Napi::Value SenderHandle::start_push(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    core()->sender->start_push();
    return info.Env().Undefined();
  });
}

Napi::Value SenderHandle::hold_eviction(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    core()->sender->hold_eviction(info[0].ToBoolean());
    return info.Env().Undefined();
  });
}

Napi::Value SenderHandle::give_up_server(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    core()->sender->give_up_server(count_of(info[0], "ordinal"), text_of(info[1], "why"));
    return info.Env().Undefined();
  });
}

Napi::Value SenderHandle::set_bandwidth(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    core()->sender->set_bandwidth(count_of(info[0], "bytesPerSecond"));
    return info.Env().Undefined();
  });
}

// Also after close(): the last figures.
Napi::Value SenderHandle::stats(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const SenderStats stats = core_->sender->stats();
    Napi::Object object = Napi::Object::New(env);
    object.Set("bytesOnWire", number(env, stats.bytes_on_wire));
    object.Set("pagesSent", number(env, stats.pages_sent));
    object.Set("pagesZero", number(env, stats.pages_zero));
    object.Set("pagesResent", number(env, stats.pages_resent));
    object.Set("pagesPending", number(env, stats.pages_pending));
    object.Set("faultsServed", number(env, stats.faults_served));
    object.Set("redials", number(env, stats.redials));
    object.Set("extraMemoryBytes", number(env, stats.extra_memory_bytes));
    object.Set("pagesDirect", number(env, stats.pages_direct));
    object.Set("pagesSingle", number(env, stats.pages_single));
    object.Set("servers", server_stats(env, stats.servers));
    object.Set("compression", encoding_stats(env, stats.compression));
    object.Set("delta", encoding_stats(env, stats.delta));
    Napi::Object base = Napi::Object::New(env);
    base.Set("pagesWithContent", number(env, stats.pages_with_content));
    base.Set("pagesCompared", number(env, stats.base.pages_compared));
    base.Set("pagesSame", number(env, stats.base.pages_same));
    base.Set("bytesSame", number(env, stats.base.bytes_same));
    base.Set("pagesEstimated", number(env, stats.base.pages_estimated));
    base.Set("pagesAlike", number(env, stats.base.pages_alike));
    base.Set("bytesOut", number(env, stats.base.bytes_out));
    base.Set("bytesIn", number(env, stats.base.bytes_in));
    base.Set("roundTrips", number(env, stats.base.round_trips));
    base.Set("sourceHashUs", number(env, stats.base.source_hash_us));
    base.Set("destinationHashUs", number(env, stats.base.destination_hash_us));
    object.Set("base", base);
    object.Set("dedup", stats.dedup ? dedup_object(env, *stats.dedup) : env.Null());
    return object;
  });
}

Napi::Value SenderHandle::digest(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const std::uint32_t region = index_of(info[0], "region");
    if (region >= holds_.size() && open_) throw std::out_of_range("region: no such region");
    return run_async(
        info.Env(), "memferry.digest",
        [core = core(), holds = holds_, region] { return core->sender->digest(region); },
        [](Napi::Env env, Hash128 hash) -> Napi::Value {
          return Napi::String::New(env, hex128(hash.high, hash.low));
        });
  });
}

Napi::Value SenderHandle::close(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    if (open_) {
      Environment::of(info.Env()).remove(this);
      end(info[0].IsBoolean() && info[0].As<Napi::Boolean>().Value());
      Unref();
    }
    return info.Env().Undefined();
  });
}

}  // namespace memferry::bind
