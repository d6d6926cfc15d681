#include "bind/restore_handle.h"

#include "bind/js_error.h"
#include "bind/values.h"
#include "restore/snapshot_file.h"

namespace memferry::bind {

namespace {

const char* kind_name(RestoreEvent::Kind kind) {
  switch (kind) {
    case RestoreEvent::Kind::kComplete:
      return "complete";
    case RestoreEvent::Kind::kLost:
      return "lost";
    case RestoreEvent::Kind::kOwnerGone:
      return "owner-gone";
    case RestoreEvent::Kind::kFailed:
      return "failed";
  }
  return "failed";
}

PrePaging pre_paging_of(const Napi::Value& value) {
  const std::string name = text_of(value, "prePaging");
  if (name == "none") return PrePaging::kNone;
  if (name == "sequential") return PrePaging::kSequential;
  if (name == "all") return PrePaging::kAll;
  throw std::invalid_argument("prePaging: none, sequential or all");
}

// Bytes [offset, offset + length) of a region that lies in one piece.
const std::byte* region_bytes(const Region& region, std::uint64_t offset, std::uint64_t length) {
  if (offset % region.page_size() != 0 || length == 0 || offset > region.bytes() ||
      length > region.bytes() - offset)
    throw std::out_of_range("a mapping beyond the region");
  const PageRun run{PageNumber{offset / region.page_size()},
                    (length + region.page_size() - 1) / region.page_size()};
  const std::span<std::byte> bytes = region.contiguous(run);
  if (bytes.size() < length) throw std::invalid_argument("a region in several pieces");
  return bytes.data();
}

double microseconds(std::chrono::nanoseconds time) { return static_cast<double>(time.count()) / 1e3; }

}  // namespace

void RestoreHandle::define(Napi::Env env) {
  const Napi::Function constructor =
      DefineClass(env, "NativeRestore",
                  {
                      InstanceMethod<&RestoreHandle::source_complete>("sourceComplete"),
                      InstanceMethod<&RestoreHandle::acknowledge_loss>("acknowledgeLoss"),
                      InstanceMethod<&RestoreHandle::stats>("stats"),
                      InstanceMethod<&RestoreHandle::close>("close"),
                  });
  Environment::of(env).restore_class = Napi::Persistent(constructor);
}

Napi::Value RestoreHandle::create(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    return Environment::of(info.Env()).restore_class.New({object_of(info[0], "config")});
  });
}

RestoreHandle::RestoreHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<RestoreHandle>(info) {
  const Napi::Env env = info.Env();
  guarded(env, [&] {
    const Napi::Object object = object_of(info[0], "config");
    std::shared_ptr<const SnapshotFile> file;
    if (object.Get("path").IsNull()) {
      source_ = RegionHandle::hold_of(object.Get("region"));
    } else {
      file = SnapshotFile::open(text_of(object.Get("path"), "path"));
    }
    SnapshotPager::Config config{
        .uffd = Userfaultfd::adopt(descriptor_of(object.Get("uffd"), "uffd"), 0),
        .owner = Process::open(descriptor_of(object.Get("pidfd"), "pidfd")),
        .spans = {},
        .page_size = count_of(object.Get("pageSize"), "pageSize"),
        .pre_paging = pre_paging_of(object.Get("prePaging")),
        .on_event = nullptr,
        .source = file,
        .read_now = nullptr,
        .still_has = nullptr,
        .source_arrives = !file,
    };
    if (file) {
      config.read_now = [file](const std::byte* from, std::span<std::byte> into) {
        return file->read_now(from, into);
      };
      config.still_has = [file](const std::byte* from, std::uint64_t bytes) {
        return file->still_has(from, bytes);
      };
    }
    const Napi::Array mappings = array_of(object.Get("mappings"), "mappings");
    for (std::uint32_t i = 0; i < mappings.Length(); ++i) {
      const Napi::Object mapping = object_of(mappings.Get(i), "mapping");
      const std::uint64_t bytes = count_of(mapping.Get("lengthBytes"), "lengthBytes");
      config.spans.push_back(
          {OwnerAddress(address_of(mapping.Get("address"))), bytes,
           file ? file->at(count_of(mapping.Get("offset"), "offset"), bytes)
                : region_bytes(source_.shared->region(), count_of(mapping.Get("offset"), "offset"), bytes)});
    }
    events_ = EventQueue::create(env, function_of(object.Get("onEvent"), "onEvent"), "memferry.restore");
    config.on_event = [events = events_](const RestoreEvent& event) {
      events->post([event](Napi::Env js, const Napi::Function& callback) {
        Napi::Array lost = Napi::Array::New(js, event.lost.size());
        for (std::size_t i = 0; i < event.lost.size(); ++i) {
          Napi::Object run = Napi::Object::New(js);
          run.Set("region", Napi::Number::New(js, 0));
          run.Set("first", number(js, event.lost[i].first.value));
          run.Set("count", number(js, event.lost[i].count));
          lost.Set(static_cast<std::uint32_t>(i), run);
        }
        callback.Call({Napi::String::New(js, kind_name(event.kind)), Napi::String::New(js, event.code),
                       Napi::String::New(js, event.message), lost});
      });
    };
    try {
      pager_ = std::make_unique<SnapshotPager>(std::move(config));
      if (source_.shared) {
        // It reads the region's memory for as long as it serves.
        source_user_ = source_.shared->region().enlist([this] { pager_->close(); });
        if (!source_user_) {
          pager_->close();
          throw RegionGone("restore");
        }
      }
      Environment::of(env).add(this);
    } catch (...) {
      events_->close();
      throw;
    }
    open_ = true;
    Ref();
  });
}

RestoreHandle::~RestoreHandle() { shut_down(); }

void RestoreHandle::shut_down() {
  if (!open_) return;
  open_ = false;
  // Whoever waits for a page of a region that will not come now would be waited for here.
  if (source_.shared) source_.shared->region().retire();
  pager_->close();
  source_user_.reset();
  events_->close();
}

Napi::Value RestoreHandle::source_complete(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    pager_->source_complete();
    return info.Env().Undefined();
  });
}

Napi::Value RestoreHandle::acknowledge_loss(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    pager_->acknowledge_loss();
    return info.Env().Undefined();
  });
}

Napi::Value RestoreHandle::stats(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const RestoreStats stats = pager_->stats();
    const LatencyHistogram& latencies = pager_->latencies();
    Napi::Object object = Napi::Object::New(env);
    object.Set("pages", number(env, stats.pages));
    object.Set("pagesInstalled", number(env, stats.installed));
    object.Set("pagesRemoved", number(env, stats.removed));
    object.Set("pagesAhead", number(env, stats.ahead));
    object.Set("pagesLost", number(env, stats.lost));
    object.Set("faults", number(env, stats.faults));
    object.Set("faultsZero", number(env, stats.zeros));
    object.Set("faultsSlow", number(env, stats.slow));
    object.Set("triedAgain", number(env, stats.again));
    object.Set("removeEvents", number(env, stats.remove_events));
    object.Set("p50Us", Napi::Number::New(env, microseconds(latencies.quantile(0.5))));
    object.Set("p99Us", Napi::Number::New(env, microseconds(latencies.quantile(0.99))));
    object.Set("maxUs", Napi::Number::New(env, microseconds(latencies.max())));
    object.Set("tracksWrites", Napi::Boolean::New(env, pager_->write_protects()));
    return object;
  });
}

Napi::Value RestoreHandle::close(const Napi::CallbackInfo& info) {
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
