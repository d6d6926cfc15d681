#include "bind/source_pager_handle.h"

#include "bind/js_error.h"
#include "bind/values.h"

namespace memferry::bind {
namespace {

const char* name_of(SourcePager::EventKind kind) {
  switch (kind) {
    case SourcePager::EventKind::kDone:
      return "done";
    case SourcePager::EventKind::kLost:
      return "lost";
    case SourcePager::EventKind::kFailed:
      return "failed";
  }
  return "";
}

}  // namespace

void SourcePagerHandle::define(Napi::Env env) {
  const Napi::Function constructor = DefineClass(env, "NativeSourcePager",
                                                 {
                                                     InstanceMethod<&SourcePagerHandle::stats>("stats"),
                                                     InstanceMethod<&SourcePagerHandle::leave>("leave"),
                                                     InstanceMethod<&SourcePagerHandle::end>("end"),
                                                 });
  Environment::of(env).source_pager_class = Napi::Persistent(constructor);
}

Napi::Value SourcePagerHandle::create(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    return Environment::of(info.Env()).source_pager_class.New({object_of(info[0], "config")});
  });
}

SourcePagerHandle::SourcePagerHandle(const Napi::CallbackInfo& info)
    : Napi::ObjectWrap<SourcePagerHandle>(info) {
  const Napi::Env env = info.Env();
  guarded(env, [&] {
    const Napi::Object object = object_of(info[0], "config");
    hold_ = RegionHandle::hold_of(object.Get("region"));
    SourcePager::Config config;
    config.region = hold_.shared->region_pointer();
    config.source = std::make_unique<FilePageSource>(
        static_cast<int>(count_of(object.Get("snapshot"), "snapshot")),
        count_of(object.Get("offset"), "offset"), config.region->page_size());
    const Napi::Value ledger = object.Get("ledger");
    if (!ledger.IsNull()) config.ledger = static_cast<int>(count_of(ledger, "ledger"));
    config.prepage = flag_of(object.Get("prepage"), "prepage");
    queue_ = EventQueue::create(env, function_of(object.Get("onEvent"), "onEvent"), "memferry.pager");
    config.on_event = [queue = queue_](const SourcePager::Event& event) {
      queue->post([event](Napi::Env js, const Napi::Function& on_event) {
        Napi::Object told = Napi::Object::New(js);
        told.Set("kind", Napi::String::New(js, name_of(event.kind)));
        told.Set("code", Napi::String::New(js, event.code));
        told.Set("message", Napi::String::New(js, event.message));
        Napi::Array lost = Napi::Array::New(js, event.lost.size());
        for (std::size_t i = 0; i < event.lost.size(); ++i) {
          Napi::Object run = Napi::Object::New(js);
          run.Set("first", number(js, event.lost[i].first.value));
          run.Set("count", number(js, event.lost[i].count));
          lost.Set(static_cast<std::uint32_t>(i), run);
        }
        told.Set("lost", lost);
        on_event.Call({told});
      });
    };
    pager_ = std::make_unique<SourcePager>(std::move(config));
    Environment::of(env).add(this);
    open_ = true;
    Ref();
  });
}

SourcePagerHandle::~SourcePagerHandle() { shut_down(); }

void SourcePagerHandle::shut_down() {
  if (!open_) return;
  open_ = false;
  pager_->leave();
  queue_->close();
}

Napi::Value SourcePagerHandle::stats(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const SourcePager::Stats stats = pager_->stats();
    Napi::Object object = Napi::Object::New(env);
    object.Set("pages", number(env, stats.pages));
    object.Set("pagesSettled", number(env, stats.settled));
    object.Set("pagesFound", number(env, stats.found));
    object.Set("pagesLost", number(env, stats.lost));
    object.Set("faults", number(env, stats.faults));
    object.Set("faultP50Us", Napi::Number::New(env, stats.p50_us));
    object.Set("faultP99Us", Napi::Number::New(env, stats.p99_us));
    return object;
  });
}

void SourcePagerHandle::close() {
  if (!open_) return;
  Environment::of(Env()).remove(this);
  shut_down();
  hold_ = RegionHold();
  Unref();
}

Napi::Value SourcePagerHandle::leave(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    close();
    return info.Env().Undefined();
  });
}

Napi::Value SourcePagerHandle::end(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    if (open_) pager_->end();
    close();
    return info.Env().Undefined();
  });
}

Napi::Value SourcePagerHandle::hold_process(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const std::shared_ptr<Process> process = Process::open(static_cast<int>(count_of(info[0], "pidfd")));
    Napi::Object held = Napi::Object::New(env);
    held.Set("pid", number(env, static_cast<std::uint64_t>(process->pid())));
    held.Set("alive", Napi::Function::New(env, [process](const Napi::CallbackInfo& call) -> Napi::Value {
               return Napi::Boolean::New(call.Env(), process->alive());
             }));
    held.Set("end", Napi::Function::New(env, [process](const Napi::CallbackInfo&) { process->end(); }));
    return held;
  });
}

}  // namespace memferry::bind
