// NativeSourcePager: pages the memory of another process from a file. Held open like a socket until it is closed, or its
// environment ends, which leaves the memory to a successor.
//
// Thread: the environment's own.
#pragma once

#include <memory>

#include "bind/environment.h"
#include "bind/event_queue.h"
#include "bind/node_api.h"
#include "bind/region_handle.h"
#include "fault/source_pager.h"

namespace memferry::bind {

class SourcePagerHandle : public Napi::ObjectWrap<SourcePagerHandle>, public Engine {
 public:
  static void define(Napi::Env env);
  // ({ region, snapshot, offset, ledger | null, prepage, onEvent })
  static Napi::Value create(const Napi::CallbackInfo& info);
  // (pidfd): { alive(), end() } of a process, to look at it and to end it.
  static Napi::Value hold_process(const Napi::CallbackInfo& info);
  explicit SourcePagerHandle(const Napi::CallbackInfo& info);
  ~SourcePagerHandle() override;
  void shut_down() override;

 private:
  Napi::Value stats(const Napi::CallbackInfo& info);
  Napi::Value leave(const Napi::CallbackInfo& info);
  Napi::Value end(const Napi::CallbackInfo& info);
  void close();

  RegionHold hold_;
  std::shared_ptr<EventQueue> queue_;
  std::unique_ptr<SourcePager> pager_;  // kept for its last figures
  bool open_ = false;
};

}  // namespace memferry::bind
