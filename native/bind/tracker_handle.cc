#include "bind/tracker_handle.h"

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bind/js_error.h"
#include "bind/values.h"
#include "bind/write_marks_handle.h"
#include "track/kvm_log.h"

namespace memferry::bind {

namespace {

constexpr napi_type_tag kTag = {0x6d66747261636b65ULL, 0x4d2f90c7a8e1b356ULL};

TrackerKind kind_of(const std::string& name) {
  if (const auto kind = tracker_kind(name)) return *kind;
  throw CodedError("TRACKER_UNAVAILABLE", "there is no dirty tracker named '" + name + "'");
}

TrackerOptions options_of(const std::string& writers, bool split_huge_pages = false) {
  TrackerOptions options;
  options.split_huge_pages = split_huge_pages;
  if (writers == "tracked-mapping") {
    options.writers = Writers::kTrackedMapping;
  } else if (writers != "anywhere") {
    throw std::invalid_argument("writers: 'anywhere' or 'tracked-mapping'");
  }
  return options;
}

Napi::Object probe_object(Napi::Env env, const TrackerProbe& found) {
  Napi::Object probe = Napi::Object::New(env);
  probe.Set("name", Napi::String::New(env, found.name));
  probe.Set("available", Napi::Boolean::New(env, found.available));
  probe.Set("reason", Napi::String::New(env, found.reason));
  probe.Set("remedy", Napi::String::New(env, found.remedy));
  return probe;
}

}  // namespace

void TrackerHandle::define(Napi::Env env) {
  const Napi::Function constructor = DefineClass(env, "NativeTracker",
                                                 {
                                                     InstanceAccessor<&TrackerHandle::name>("name"),
                                                     InstanceMethod<&TrackerHandle::arm>("arm"),
                                                     InstanceMethod<&TrackerHandle::collect>("collect"),
                                                     InstanceMethod<&TrackerHandle::disarm>("disarm"),
                                                     InstanceMethod<&TrackerHandle::close>("close"),
                                                 });
  Environment::of(env).tracker_class = Napi::Persistent(constructor);
}

TrackerHandle::TrackerHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<TrackerHandle>(info) {
  if (info.Length() != 1 || !info[0].IsExternal()) {
    throw Napi::TypeError::New(info.Env(), "trackers are made by makeTracker");
  }
  made_ = std::move(*info[0].As<Napi::External<Made>>().Data());
  Value().TypeTag(&kTag);
}

Napi::Value TrackerHandle::make(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const TrackerKind kind = kind_of(text_of(info[0], "name"));
    Made made;
    made.hold = RegionHandle::hold_of(info[1]);
    made.tracker = make_tracker(kind, made.hold.shared->region_pointer(),
                                options_of(text_of(info[2], "writers"), flag_of(info[3], "splitHugePages")));
    made.turn = std::make_shared<std::mutex>();
    return Environment::of(env).tracker_class.New({Napi::External<Made>::New(env, &made)});
  });
}

Napi::Value TrackerHandle::make_kvm_log(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    Made made;
    made.hold = RegionHandle::hold_of(info[0]);
    const auto& region = made.hold.shared->region_pointer();
    KvmLog log;
    log.vm_fd = static_cast<int>(index_of(info[1], "vmFd"));
    if (!info[2].IsTypedArray() || info[2].As<Napi::TypedArray>().TypedArrayType() != napi_float64_array) {
      throw std::invalid_argument("slots: no Float64Array");
    }
    const auto triples = info[2].As<Napi::Float64Array>();
    for (std::size_t i = 0; i + 2 < triples.ElementLength(); i += 3) {
      log.slots.push_back({static_cast<std::uint32_t>(triples[i]),
                           {PageNumber{static_cast<std::uint64_t>(triples[i + 1])},
                            static_cast<std::uint64_t>(triples[i + 2])}});
    }
    log.marks = WriteMarksHandle::marks_of(info[3]);
    log.manual_protect = flag_of(info[6], "manualProtect");
    std::unique_ptr<DirtyTracker> others;
    if (!info[4].IsNull()) {
      others =
          make_tracker(kind_of(text_of(info[4], "others")), region, options_of(text_of(info[5], "writers")));
    }
    std::unique_ptr<DirtyTracker> tracker =
        std::make_unique<KvmLogTracker>(region, std::move(log), std::move(others));
    if (flag_of(info[7], "splitHugePages")) tracker = split_huge_pages(region, std::move(tracker));
    made.tracker = std::move(tracker);
    made.turn = std::make_shared<std::mutex>();
    return Environment::of(env).tracker_class.New({Napi::External<Made>::New(env, &made)});
  });
}

Napi::Value TrackerHandle::probe(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const std::vector<TrackerProbe> probes = probe_trackers();
    Napi::Array array = Napi::Array::New(env, probes.size());
    for (std::size_t i = 0; i < probes.size(); ++i)
      array.Set(static_cast<std::uint32_t>(i), probe_object(env, probes[i]));
    return array;
  });
}

Napi::Value TrackerHandle::probe_one(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    return probe_object(env, probe_tracker(kind_of(text_of(info[0], "name"))));
  });
}

Napi::Value TrackerHandle::refusal(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const TrackerKind kind = kind_of(text_of(info[0], "name"));
    const RegionHold hold = RegionHandle::hold_of(info[1]);
    const RegionUse use(hold.shared->region_pointer(), "tracker");
    const auto refused =
        tracker_refusal(kind, hold.shared->region(), options_of(text_of(info[2], "writers")));
    return refused ? Napi::Value(Napi::String::New(env, *refused)) : env.Null();
  });
}

LentTracker TrackerHandle::lend(const Napi::Value& value) {
  if (value.IsNull()) return {};
  if (!value.IsObject() || !value.As<Napi::Object>().CheckTypeTag(&kTag)) {
    throw std::invalid_argument("expected a tracker of the addon, or null");
  }
  TrackerHandle* handle = Unwrap(value.As<Napi::Object>());
  (void)handle->tracker();
  return {handle->made_.tracker, handle->made_.turn};
}

DirtyTracker& TrackerHandle::tracker() const {
  if (!made_.tracker) throw CodedError("TRACKER_CLOSED", "the tracker is closed");
  if (made_.hold.shared->region().retired()) throw CodedError("REGION_GONE", "the region's memory is gone");
  return *made_.tracker;
}

Napi::Value TrackerHandle::name(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    return Napi::String::New(info.Env(), std::string(tracker().name()));
  });
}

Napi::Value TrackerHandle::arm(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    DirtyTracker& armed = tracker();
    const std::lock_guard lock(*made_.turn);
    armed.arm();
    return info.Env().Undefined();
  });
}

Napi::Value TrackerHandle::collect(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&] {
    DirtyTracker& tracker = this->tracker();
    const std::uint64_t capacity = made_.hold.shared->region().capacity_pages();
    const PageNumber end{capacity};
    if (!dirty_) dirty_ = std::make_unique<AtomicBitmap>(capacity);
    {
      const std::lock_guard lock(*made_.turn);
      tracker.collect(*dirty_);
    }
    std::vector<PageRun> runs;
    PageNumber from{0};
    while (const auto run = dirty_->take_run(from, end, capacity)) {
      runs.push_back(*run);
      from = run->end();
    }
    return run_pairs(env, runs);
  });
}

Napi::Value TrackerHandle::disarm(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    if (made_.tracker && !made_.hold.shared->region().retired()) {
      const std::lock_guard lock(*made_.turn);
      made_.tracker->disarm();
    }
    return info.Env().Undefined();
  });
}

Napi::Value TrackerHandle::close(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    made_ = Made();
    dirty_.reset();
    return info.Env().Undefined();
  });
}

}  // namespace memferry::bind
