// NativeWriteMarks: the marks of a VMM that writes its guest's memory itself, as a handle and as memory that another
// addon can set bits in.
//
// Thread: the environment's own; the marks themselves from any.
#pragma once

#include <memory>

#include "bind/node_api.h"
#include "track/write_marks.h"

namespace memferry::bind {

class WriteMarksHandle : public Napi::ObjectWrap<WriteMarksHandle> {
 public:
  static void define(Napi::Env env, Napi::Object exports);

  // The marks behind a handle that came from JavaScript; null for null. Throws std::invalid_argument.
  static std::shared_ptr<WriteMarks> marks_of(const Napi::Value& value);

  explicit WriteMarksHandle(const Napi::CallbackInfo& info);

 private:
  Napi::Value words(const Napi::CallbackInfo& info);
  Napi::Value mark(const Napi::CallbackInfo& info);

  std::shared_ptr<WriteMarks> marks_;
};

}  // namespace memferry::bind
