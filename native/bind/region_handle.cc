#include "bind/region_handle.h"

#include <algorithm>
#include <string>

#include "bind/async_work.h"
#include "bind/memory_map.h"
#include "bind/region_digest.h"
#include "bind/region_image.h"
#include "bind/values.h"
#include "os/mapping.h"

namespace memferry::bind {

namespace {

constexpr napi_type_tag kTag = {0x6d66726567696f6eULL, 0x9b1e6a5c03f24d71ULL};
constexpr std::uint64_t kMaxViewBytes = 1ULL << 32U;  // of an ArrayBuffer in every supported Node

// External ArrayBuffers over memory of our own; each keeps the memory.
Napi::Array views_of(Napi::Env env, const std::shared_ptr<SharedRegion>& shared) {
  Napi::Array buffers = Napi::Array::New(env);
  if (!shared->own_memory()) return buffers;
  std::uint32_t count = 0;
  for (const Extent& extent : shared->region().extents()) {
    for (std::uint64_t start = 0; start < extent.bytes; start += kMaxViewBytes) {
      auto keeper = std::make_unique<std::shared_ptr<SharedRegion>>(shared);
      const auto length = static_cast<std::size_t>(std::min(kMaxViewBytes, extent.bytes - start));
      napi_value buffer = nullptr;
      const napi_status status = napi_create_external_arraybuffer(
          env, Address{extent.start.value}.pointer() + start, length,
          [](napi_env, void*, void* hint) { delete static_cast<std::shared_ptr<SharedRegion>*>(hint); },
          keeper.get(), &buffer);
      if (status == napi_no_external_buffers_allowed) {
        throw CodedError("UNSUPPORTED_PLATFORM", "this runtime has no ArrayBuffers over memory of others");
      }
      if (status != napi_ok) throw Napi::Error::New(env);
      keeper.release();
      buffers.Set(count++, Napi::Value(env, buffer));
    }
  }
  return buffers;
}

}  // namespace

void RegionHandle::define(Napi::Env env) {
  const Napi::Function constructor =
      DefineClass(env, "NativeRegion",
                  {
                      InstanceAccessor<&RegionHandle::id>("id"),
                      InstanceAccessor<&RegionHandle::page_size>("pageSize"),
                      InstanceAccessor<&RegionHandle::capacity_pages>("capacityPages"),
                      InstanceMethod<&RegionHandle::pages>("pages"),
                      InstanceMethod<&RegionHandle::grow>("grow"),
                      InstanceMethod<&RegionHandle::mapped_pages>("mappedPages"),
                      InstanceMethod<&RegionHandle::retired>("retired"),
                      InstanceMethod<&RegionHandle::retire>("retire"),
                      InstanceMethod<&RegionHandle::buffers>("buffers"),
                      InstanceMethod<&RegionHandle::starts_at>("startsAt"),
                      InstanceMethod<&RegionHandle::attached>("attached"),
                      InstanceMethod<&RegionHandle::claimed>("claimed"),
                      InstanceMethod<&RegionHandle::claim>("claim"),
                      InstanceMethod<&RegionHandle::release>("release"),
                      InstanceMethod<&RegionHandle::digest>("digest"),
                      InstanceMethod<&RegionHandle::fill>("fill"),
                      InstanceMethod<&RegionHandle::fill_from>("fillFrom"),
                      InstanceMethod<&RegionHandle::save>("save"),
                      InstanceMethod<&RegionHandle::close>("close"),
                  });
  Environment::of(env).region_class = Napi::Persistent(constructor);
}

RegionHandle::RegionHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<RegionHandle>(info) {
  if (info.Length() != 1 || !info[0].IsExternal()) {
    throw Napi::TypeError::New(info.Env(), "regions are made by allocate, adopt and openRegion");
  }
  hold_ = std::move(*info[0].As<Napi::External<RegionHold>>().Data());
  hold_.shared->add_handle();
  open_ = true;
  Value().TypeTag(&kTag);
}

// Collected without close(), or at the environment's end.
RegionHandle::~RegionHandle() {
  if (!open_) return;
  if (holds_claim_) hold_.shared->release();
  hold_.shared->drop_handle();
  // Another thread may be moving our memory through a handle of its own: then it stays pinned until that is
  // closed.
  if (hold_.adoption && !hold_.adoption->detached())
    Environment::of(Env()).keep_while_shared(std::move(hold_.adoption));
}

Napi::Object RegionHandle::wrap(Napi::Env env, RegionHold hold) {
  return Environment::of(env).region_class.New({Napi::External<RegionHold>::New(env, &hold)});
}

RegionHold RegionHandle::hold_of(const Napi::Value& value) {
  if (!value.IsObject() || !value.As<Napi::Object>().CheckTypeTag(&kTag)) {
    throw std::invalid_argument("expected a region of the addon");
  }
  return Unwrap(value.As<Napi::Object>())->hold();
}

const RegionHold& RegionHandle::hold() const {
  if (!open_) throw CodedError("REGION_CLOSED", "the region is closed");
  return hold_;
}

Napi::Value RegionHandle::allocate(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&] {
    const std::uint64_t bytes = count_of(info[0], "lengthBytes");
    const bool huge = info[1].ToBoolean().Value();
    auto shared = SharedRegion::publish(huge ? Region::allocate_huge(bytes) : Region::allocate(bytes), true);
    return Napi::Value(wrap(env, {std::move(shared), nullptr}));
  });
}

Napi::Value RegionHandle::adopt(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&] {
    const Napi::Array views = array_of(info[0], "views");
    const std::uint64_t capacity = count_of(info[1], "capacityBytes");
    const std::uint64_t page_size = system_page_size();
    std::vector<Napi::Object> pinned;
    std::vector<Extent> extents;
    std::uint64_t bytes_before_last = 0;
    for (std::uint32_t i = 0; i < views.Length(); ++i) {
      const Napi::Value view = views.Get(i);
      const std::span<std::byte> bytes = bytes_of(view, "views");
      const Address start = Address::of(bytes.data());
      if (start.value % page_size != 0) {
        throw CodedError("UNALIGNED",
                         "the buffer starts " + std::to_string(start.value % page_size) +
                             " bytes after a page boundary, and only whole pages can move: use "
                             "Region.allocate, or make it with new ArrayBuffer(n, { maxByteLength: n }) "
                             "(or SharedArrayBuffer), which is a mapping of its own");
      }
      if (!extents.empty()) bytes_before_last += extents.back().bytes;
      extents.push_back({start, bytes.size()});
      pinned.push_back(view.As<Napi::Object>());
    }
    if (info[2].IsObject()) pinned.push_back(info[2].As<Napi::Object>());
    if (capacity < bytes_before_last) throw std::invalid_argument("capacityBytes: less than the views");
    auto shared = SharedRegion::publish(Region::adopt(extents, capacity - bytes_before_last), false);
    auto adoption = Environment::of(env).adopt(shared, pinned);
    return Napi::Value(wrap(env, {std::move(shared), std::move(adoption)}));
  });
}

Napi::Value RegionHandle::open(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const std::string id = text_of(info[0], "id");
    auto shared = SharedRegion::find(id);
    if (!shared || shared->region().retired()) return env.Null();
    auto adoption = Environment::of(env).adoption_of(id);
    return wrap(env, {std::move(shared), std::move(adoption)});
  });
}

Napi::Value RegionHandle::reserved_bytes(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    return number(info.Env(), mapped_span(Address::of(bytes_of(info[0], "view").data())).reserved_bytes);
  });
}

Napi::Value RegionHandle::id(const Napi::CallbackInfo& info) {
  return Napi::String::New(info.Env(), hold_.shared->id());
}

Napi::Value RegionHandle::page_size(const Napi::CallbackInfo& info) {
  return number(info.Env(), hold_.shared->region().page_size());
}

Napi::Value RegionHandle::capacity_pages(const Napi::CallbackInfo& info) {
  return number(info.Env(), hold_.shared->region().capacity_pages());
}

Napi::Value RegionHandle::pages(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value { return number(info.Env(), region().pages()); });
}

Napi::Value RegionHandle::grow(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const std::uint64_t pages = count_of(info[0], "pages");
    if (pages > region().capacity_pages())
      throw std::out_of_range("a region cannot grow beyond its capacity");
    if (pages > region().pages()) region().grow(pages);
    return info.Env().Undefined();
  });
}

Napi::Value RegionHandle::mapped_pages(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const std::uint64_t pages = region().pages();
    const std::uint64_t capacity = region().capacity_pages();
    if (pages == capacity || region().retired()) return number(info.Env(), pages);
    const Extent last = region().extents().back();
    const std::uint64_t before_last = pages - last.bytes / region().page_size();
    const std::uint64_t mapped = before_last + mapped_span(last.start).writable_bytes / region().page_size();
    return number(info.Env(), std::clamp(mapped, pages, capacity));
  });
}

Napi::Value RegionHandle::retired(const Napi::CallbackInfo& info) {
  return Napi::Boolean::New(info.Env(), hold_.shared->region().retired());
}

Napi::Value RegionHandle::retire(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    region().retire();
    return info.Env().Undefined();
  });
}

Napi::Value RegionHandle::buffers(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value { return views_of(info.Env(), hold().shared); });
}

Napi::Value RegionHandle::starts_at(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const OwnerAddress start = Address::of(bytes_of(info[0], "view").data());
    return Napi::Boolean::New(info.Env(), start == region().extents().front().start);
  });
}

Napi::Value RegionHandle::claimed(const Napi::CallbackInfo& info) {
  return Napi::Boolean::New(info.Env(), hold_.shared->claimed());
}

Napi::Value RegionHandle::claim(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const bool won = hold().shared->claim();
    if (won) holds_claim_ = true;
    return Napi::Boolean::New(info.Env(), won);
  });
}

// Only the handle that claimed can release, so that one migration's end cannot free another's claim.
Napi::Value RegionHandle::release(const Napi::CallbackInfo& info) {
  if (holds_claim_) hold_.shared->release();
  holds_claim_ = false;
  return info.Env().Undefined();
}

Napi::Value RegionHandle::digest(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&] {
    return run_async(
        env, "memferry.digest", [held = hold()] { return region_digest(held.shared->region_pointer()); },
        [](Napi::Env js, Hash128 hash) -> Napi::Value {
          return Napi::String::New(js, hex128(hash.high, hash.low));
        });
  });
}

Napi::Value RegionHandle::fill(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const std::string path = text_of(info[0], "path");
    const std::uint64_t offset = count_of(info[1], "offsetBytes");
    const PageRun run{PageNumber{count_of(info[2], "first")}, count_of(info[3], "count")};
    return run_async(
        info.Env(), "memferry.fill",
        [held = hold(), path, offset, run] {
          return fill_from_file(held.shared->region_pointer(), path, offset, run);
        },
        [](Napi::Env js, std::uint64_t bytes) -> Napi::Value { return number(js, bytes); });
  });
}

Napi::Value RegionHandle::fill_from(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const PageRun run{PageNumber{count_of(info[1], "first")}, count_of(info[2], "count")};
    return run_async(
        info.Env(), "memferry.fillFrom",
        [held = hold(), from = hold_of(info[0]), run] {
          return fill_from_region(held.shared->region_pointer(), from.shared->region_pointer(), run);
        },
        [](Napi::Env js, std::uint64_t bytes) -> Napi::Value { return number(js, bytes); });
  });
}

Napi::Value RegionHandle::save(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const std::string path = text_of(info[0], "path");
    const PageRun run{PageNumber{count_of(info[1], "first")}, count_of(info[2], "count")};
    return run_async(
        info.Env(), "memferry.save",
        [held = hold(), path, run] {
          save_to_file(held.shared->region_pointer(), path, run);
          return true;
        },
        [](Napi::Env js, bool) -> Napi::Value { return js.Undefined(); });
  });
}

Napi::Value RegionHandle::close(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    if (open_) {
      (void)release(info);
      open_ = false;
      notice_.reset();
      hold_.shared->drop_handle();
      hold_.adoption.reset();  // the last one retires the region
    }
    return info.Env().Undefined();
  });
}

}  // namespace memferry::bind
