// The addon's entry: everything that src/native.ts declares, for each environment that loads it.
//
// Thread: the environment's own.
#include "bind/engine_handles.h"
#include "bind/environment.h"
#include "bind/fd_channel_handle.h"
#include "bind/held_state_handle.h"
#include "bind/js_error.h"
#include "bind/kernel_features.h"
#include "bind/node_api.h"
#include "bind/page_functions.h"
#include "bind/region_handle.h"
#include "bind/restore_handle.h"
#include "bind/sampler_handle.h"
#include "bind/share_handle.h"
#include "bind/sigbus.h"
#include "bind/source_pager_handle.h"
#include "bind/spreader_handle.h"
#include "bind/stage_handle.h"
#include "bind/tracker_handle.h"
#include "bind/values.h"
#include "bind/write_marks_handle.h"
#include "os/mapping.h"

namespace memferry::bind {

namespace {

Napi::Value probe_features(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const std::vector<KernelFeature> features = probe_kernel_features();
    Napi::Array array = Napi::Array::New(env, features.size());
    for (std::size_t i = 0; i < features.size(); ++i) {
      Napi::Object feature = Napi::Object::New(env);
      feature.Set("name", Napi::String::New(env, features[i].name));
      feature.Set("available", Napi::Boolean::New(env, features[i].available));
      feature.Set("reason", Napi::String::New(env, features[i].reason));
      feature.Set("remedy", Napi::String::New(env, features[i].remedy));
      array.Set(static_cast<std::uint32_t>(i), feature);
    }
    return array;
  });
}

Napi::Value close_engines(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    Environment::of(info.Env()).shut_down_engines();
    return info.Env().Undefined();
  });
}

Napi::Value retire_all_regions(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    SharedRegion::retire_all();
    return info.Env().Undefined();
  });
}

Napi::Value forward_sigbus(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    forward_sigbus_to_webassembly();
    return info.Env().Undefined();
  });
}

Napi::Object init(Napi::Env env, Napi::Object exports) {
  Environment::attach(env);
  RegionHandle::define(env);
  TrackerHandle::define(env);
  SenderHandle::define(env);
  ReceiverHandle::define(env);
  ListenerHandle::define(env);
  StageHandle::define(env);
  HeldStateHandle::define(env);
  SamplerHandle::define(env);
  SourcePagerHandle::define(env);
  SpreaderHandle::define(env);
  ShareHandle::define(env);
  FdListenerHandle::define(env);
  RestoreHandle::define(env);
  FdConnectionHandle::define(env);

  exports.Set("pageSize", number(env, system_page_size()));
  exports.Set("allocate", Napi::Function::New<RegionHandle::allocate>(env, "allocate"));
  exports.Set("adopt", Napi::Function::New<RegionHandle::adopt>(env, "adopt"));
  exports.Set("attach", Napi::Function::New<RegionHandle::attach>(env, "attach"));
  exports.Set("registerMissing", Napi::Function::New<RegionHandle::register_missing>(env, "registerMissing"));
  exports.Set("openPidfd", Napi::Function::New<RegionHandle::open_pidfd>(env, "openPidfd"));
  exports.Set("takeDescriptor", Napi::Function::New<RegionHandle::take_descriptor>(env, "takeDescriptor"));
  exports.Set("openRegion", Napi::Function::New<RegionHandle::open>(env, "openRegion"));
  exports.Set("reservedBytes", Napi::Function::New<RegionHandle::reserved_bytes>(env, "reservedBytes"));
  exports.Set("probeTrackers", Napi::Function::New<TrackerHandle::probe>(env, "probeTrackers"));
  exports.Set("probeTracker", Napi::Function::New<TrackerHandle::probe_one>(env, "probeTracker"));
  exports.Set("trackerRefusal", Napi::Function::New<TrackerHandle::refusal>(env, "trackerRefusal"));
  exports.Set("probeFeatures", Napi::Function::New<probe_features>(env, "probeFeatures"));
  exports.Set("makeTracker", Napi::Function::New<TrackerHandle::make>(env, "makeTracker"));
  exports.Set("makeKvmLog", Napi::Function::New<TrackerHandle::make_kvm_log>(env, "makeKvmLog"));
  WriteMarksHandle::define(env, exports);
  define_page_functions(env, exports);
  exports.Set("createSender", Napi::Function::New<SenderHandle::create>(env, "createSender"));
  exports.Set("createReceiver", Napi::Function::New<ReceiverHandle::create>(env, "createReceiver"));
  exports.Set("createListener", Napi::Function::New<ListenerHandle::create>(env, "createListener"));
  exports.Set("createStage", Napi::Function::New<StageHandle::create>(env, "createStage"));
  exports.Set("createSourcePager", Napi::Function::New<SourcePagerHandle::create>(env, "createSourcePager"));
  exports.Set("holdProcess", Napi::Function::New<SourcePagerHandle::hold_process>(env, "holdProcess"));
  exports.Set("createSampler", Napi::Function::New<SamplerHandle::create>(env, "createSampler"));
  exports.Set("createSpreader", Napi::Function::New<SpreaderHandle::create>(env, "createSpreader"));
  exports.Set("createRestore", Napi::Function::New<RestoreHandle::create>(env, "createRestore"));
  exports.Set("createFdListener", Napi::Function::New<FdListenerHandle::create>(env, "createFdListener"));
  exports.Set("peerPid", Napi::Function::New<FdConnectionHandle::peer_of_descriptor>(env, "peerPid"));
  exports.Set("connectFdChannel", Napi::Function::New<FdConnectionHandle::connect>(env, "connectFdChannel"));
  exports.Set("openShare", Napi::Function::New<ShareHandle::open>(env, "openShare"));
  exports.Set("closeEngines", Napi::Function::New<close_engines>(env, "closeEngines"));
  exports.Set("retireAllRegions", Napi::Function::New<retire_all_regions>(env, "retireAllRegions"));
  exports.Set("forwardSigbusToWebAssembly",
              Napi::Function::New<forward_sigbus>(env, "forwardSigbusToWebAssembly"));
  return exports;
}

}  // namespace

NODE_API_MODULE(memferry, init)

}  // namespace memferry::bind
