// NativeRestore: a SnapshotPager over a file or over a region that a migration fills, as a handle. An open handle is never collected: like a socket it lives until
// it is closed, or its environment ends.
//
// Thread: the environment's own.
#pragma once

#include <memory>

#include "bind/environment.h"
#include "bind/event_queue.h"
#include "bind/node_api.h"
#include "bind/region_handle.h"
#include "restore/snapshot_pager.h"

namespace memferry::bind {

class RestoreHandle : public Napi::ObjectWrap<RestoreHandle>, public Engine {
 public:
  static void define(Napi::Env env);
  static Napi::Value create(const Napi::CallbackInfo& info);
  explicit RestoreHandle(const Napi::CallbackInfo& info);
  ~RestoreHandle() override;
  void shut_down() override;

 private:
  Napi::Value source_complete(const Napi::CallbackInfo& info);
  Napi::Value acknowledge_loss(const Napi::CallbackInfo& info);
  Napi::Value stats(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);

  RegionHold source_;                     // of a source that is a region
  std::unique_ptr<SnapshotPager> pager_;  // kept after close() for its last figures
  std::unique_ptr<Region::User> source_user_;
  std::shared_ptr<EventQueue> events_;
  bool open_ = false;
};

}  // namespace memferry::bind
