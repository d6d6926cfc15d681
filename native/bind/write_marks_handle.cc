#include "bind/write_marks_handle.h"

#include <stdexcept>

#include "bind/js_error.h"
#include "bind/values.h"

namespace memferry::bind {

namespace {

constexpr napi_type_tag kTag = {0x6d666d61726b7301ULL, 0x8d1c5e02b7f94a63ULL};

}  // namespace

void WriteMarksHandle::define(Napi::Env env, Napi::Object exports) {
  exports.Set("WriteMarks", DefineClass(env, "NativeWriteMarks",
                                        {
                                            InstanceMethod<&WriteMarksHandle::words>("words"),
                                            InstanceMethod<&WriteMarksHandle::mark>("mark"),
                                        }));
}

// new WriteMarks(capacityPages)
WriteMarksHandle::WriteMarksHandle(const Napi::CallbackInfo& info)
    : Napi::ObjectWrap<WriteMarksHandle>(info) {
  guarded(info.Env(), [&] { marks_ = std::make_shared<WriteMarks>(count_of(info[0], "pages")); });
  Value().TypeTag(&kTag);
}

std::shared_ptr<WriteMarks> WriteMarksHandle::marks_of(const Napi::Value& value) {
  if (value.IsNull()) return nullptr;
  if (!value.IsObject() || !value.As<Napi::Object>().CheckTypeTag(&kTag)) {
    throw std::invalid_argument("expected marks of the addon, or null");
  }
  return Unwrap(value.As<Napi::Object>())->marks_;
}

// An ArrayBuffer that keeps the marks.
Napi::Value WriteMarksHandle::words(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const Napi::Env env = info.Env();
    auto keeper = std::make_unique<std::shared_ptr<WriteMarks>>(marks_);
    const std::span<std::uint64_t> all = marks_->words();
    napi_value buffer = nullptr;
    const napi_status status = napi_create_external_arraybuffer(
        env, all.data(), all.size_bytes(),
        [](napi_env, void*, void* hint) { delete static_cast<std::shared_ptr<WriteMarks>*>(hint); },
        keeper.get(), &buffer);
    if (status == napi_no_external_buffers_allowed) {
      throw CodedError("UNSUPPORTED_PLATFORM", "this runtime has no ArrayBuffers over memory of others");
    }
    if (status != napi_ok) throw Napi::Error::New(env);
    keeper.release();
    return {env, buffer};
  });
}

Napi::Value WriteMarksHandle::mark(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    marks_->mark({PageNumber{count_of(info[0], "first")}, count_of(info[1], "count")});
    return info.Env().Undefined();
  });
}

}  // namespace memferry::bind
