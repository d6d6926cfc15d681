// NativeTracker: a dirty tracker as a handle, and lent to senders.
//
// Thread: the environment's own; the tracker itself is also called from a sender's.
#pragma once

#include <memory>
#include <mutex>

#include "bind/node_api.h"
#include "bind/region_handle.h"
#include "page/bitmap.h"
#include "track/dirty_tracker.h"

namespace memferry::bind {

// What a sender gets of a tracker. Whoever arms, collects or disarms holds `turn`: a tracker is called by one
// thread at a time, and a sender's calls come from the pool while JavaScript has the handle.
struct LentTracker {
  std::shared_ptr<DirtyTracker> tracker;
  std::shared_ptr<std::mutex> turn;
};

class TrackerHandle : public Napi::ObjectWrap<TrackerHandle> {
 public:
  static void define(Napi::Env env);
  static Napi::Value make(const Napi::CallbackInfo& info);
  static Napi::Value make_kvm_log(const Napi::CallbackInfo& info);
  static Napi::Value probe(const Napi::CallbackInfo& info);
  static Napi::Value probe_one(const Napi::CallbackInfo& info);
  static Napi::Value refusal(const Napi::CallbackInfo& info);

  // For a sender; empty for null. Throws std::invalid_argument, CodedError (TRACKER_CLOSED, REGION_GONE).
  static LentTracker lend(const Napi::Value& value);

  explicit TrackerHandle(const Napi::CallbackInfo& info);

 private:
  struct Made {
    std::shared_ptr<DirtyTracker> tracker;
    std::shared_ptr<std::mutex> turn;
    RegionHold hold;
  };
  [[nodiscard]] DirtyTracker& tracker() const;  // throws CodedError (TRACKER_CLOSED, REGION_GONE)

  Napi::Value name(const Napi::CallbackInfo& info);
  Napi::Value arm(const Napi::CallbackInfo& info);
  Napi::Value collect(const Napi::CallbackInfo& info);
  Napi::Value disarm(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);

  Made made_;
  std::unique_ptr<AtomicBitmap> dirty_;
};

}  // namespace memferry::bind
