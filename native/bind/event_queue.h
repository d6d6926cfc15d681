// Events from native threads to one JavaScript callback, in order.
//
// The queue has no bound, because a native thread must never wait for a JavaScript thread that may itself be
// blocked on a missing page; what goes through it is few by nature (a handful of state changes for each
// migration, and control connections, of which the listener's handle bounds those that wait).
//
// It does not keep the process alive. After close() nothing is delivered, not even what was posted before.
//
// Threads: post() any; everything else the environment's own.
#pragma once

#include <functional>
#include <memory>
#include <mutex>

#include "bind/node_api.h"

namespace memferry::bind {

class EventQueue : public std::enable_shared_from_this<EventQueue> {
 public:
  // Calls the callback with what the event is about.
  using Deliver = std::function<void(Napi::Env, const Napi::Function&)>;

  static std::shared_ptr<EventQueue> create(Napi::Env env, const Napi::Function& callback, const char* name);
  ~EventQueue() = default;  // close() comes first, on the environment's thread
  EventQueue(const EventQueue&) = delete;
  EventQueue& operator=(const EventQueue&) = delete;

  void post(Deliver deliver);
  void close();  // may be called twice

 private:
  struct Item;
  EventQueue() = default;
  static void deliver_item(napi_env env, napi_value callback, void* context, void* data);

  // Guards `function_`: a thread-safe function that has been let go may be freed at any time, so nobody
  // may be inside a call to it then.
  std::mutex mutex_;
  napi_threadsafe_function function_ = nullptr;
  bool closed_ = false;  // only touched on the environment's thread
};

}  // namespace memferry::bind
