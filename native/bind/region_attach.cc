// Region.attach: memory of another process.
#include <sys/syscall.h>
#include <unistd.h>

#include <utility>
#include <vector>

#include "bind/js_error.h"
#include "bind/region_handle.h"
#include "bind/values.h"
#include "fault/begin_paging.h"

namespace memferry::bind {
namespace {

// All that paging and tracking use, of what this kernel has; none of the events, which whoever makes a userfaultfd asks
// for itself: its own system calls wait for their reader.
std::uint64_t features_to_ask() {
  return Userfaultfd::probe().features &
         (UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MINOR_HUGETLBFS |
          abi::kUffdFeatureWpHugetlbfsShmem | abi::kUffdFeatureWpUnpopulated | abi::kUffdFeatureWpAsync |
          abi::kUffdFeaturePoison);
}

// (pidfd, uffd | null, mappings, memory | null)
Region::Attachment attachment_of(const Napi::CallbackInfo& info) {
  Region::Attachment attachment;
  attachment.owner = Process::open(descriptor_of(info[0], "pidfd"));
  if (!info[1].IsNull())
    attachment.uffd = Userfaultfd::adopt(descriptor_of(info[1], "uffd"), features_to_ask());
  const Napi::Array mappings = array_of(info[2], "mappings");
  for (std::uint32_t i = 0; i < mappings.Length(); ++i) {
    const Napi::Object mapping = object_of(mappings.Get(i), "mapping");
    attachment.extents.push_back({OwnerAddress{address_of(mapping.Get("address"))},
                                  count_of(mapping.Get("lengthBytes"), "lengthBytes")});
    attachment.offsets.push_back(count_of(mapping.Get("offset"), "offset"));
  }
  if (!info[3].IsNull()) attachment.memory = duplicate(descriptor_of(info[3], "memory"));
  return attachment;
}

}  // namespace

OwnerNotice::OwnerNotice(Environment& environment, std::shared_ptr<EventQueue> queue)
    : environment_(environment), queue_(std::move(queue)) {
  environment_.add(this);
}

OwnerNotice::~OwnerNotice() {
  environment_.remove(this);
  queue_->close();
}

Napi::Value RegionHandle::register_missing(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const auto region = Region::attach(attachment_of(info));
    if (region->uffd() == nullptr) throw std::invalid_argument("uffd: it is missing");
    begin_paging(*region);
    return info.Env().Undefined();
  });
}

Napi::Value RegionHandle::attach(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    Region::Attachment attachment = attachment_of(info);
    const auto queue = EventQueue::create(env, function_of(info[4], "onGone"), "memferry.owner");
    auto notice = std::make_unique<OwnerNotice>(Environment::of(env), queue);
    auto shared = SharedRegion::publish(Region::attach(std::move(attachment)), false);
    shared->watch_owner([queue](const std::string& message) {
      queue->post([message](Napi::Env js, const Napi::Function& gone) {
        gone.Call({Napi::String::New(js, message)});
      });
    });
    const Napi::Object handle = wrap(env, {std::move(shared), nullptr});
    Unwrap(handle)->notice_ = std::move(notice);
    return handle;
  });
}

Napi::Value RegionHandle::open_pidfd(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const long fd = ::syscall(SYS_pidfd_open, descriptor_of(info[0], "pid"), 0U);
    if (fd < 0) throw_errno("pidfd_open");
    return number(info.Env(), static_cast<std::uint64_t>(fd));
  });
}

Napi::Value RegionHandle::take_descriptor(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const long fd =
        ::syscall(SYS_pidfd_getfd, descriptor_of(info[0], "pidfd"), descriptor_of(info[1], "descriptor"), 0U);
    if (fd < 0) throw_errno("pidfd_getfd");
    return number(info.Env(), static_cast<std::uint64_t>(fd));
  });
}

Napi::Value RegionHandle::attached(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    Region& attached = hold_.shared->region();
    if (!attached.owner()) return env.Null();
    const Userfaultfd* const uffd = attached.uffd();
    Napi::Object how = Napi::Object::New(env);
    how.Set("pid", number(env, static_cast<std::uint64_t>(attached.owner()->pid())));
    how.Set("alive", Napi::Boolean::New(env, attached.owner()->alive()));
    how.Set("paged", Napi::Boolean::New(env, uffd != nullptr));
    how.Set("writeTracked",
            Napi::Boolean::New(env, uffd != nullptr && (uffd->enabled() & abi::kUffdFeatureWpAsync) != 0));
    how.Set("shared", Napi::Boolean::New(env, !attached.remote()));
    return how;
  });
}

}  // namespace memferry::bind
