// NativeSender, NativeReceiver and NativeListener: the engine's three classes as handles. An open handle is
// never collected: like a socket it lives until it is closed, or its environment ends.
//
// Thread: the environment's own; calls that scan memory run on a thread of the pool.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "bind/environment.h"
#include "bind/event_queue.h"
#include "bind/node_api.h"
#include "bind/region_handle.h"
#include "bind/tracker_handle.h"
#include "transfer/listener.h"
#include "transfer/receiver.h"
#include "transfer/sender.h"

namespace memferry::bind {

class SenderHandle : public Napi::ObjectWrap<SenderHandle>, public Engine {
 public:
  static void define(Napi::Env env);
  static Napi::Value create(const Napi::CallbackInfo& info);
  explicit SenderHandle(const Napi::CallbackInfo& info);
  ~SenderHandle() override;
  void shut_down() override;

 private:
  // Shared with work on the pool, which may outlast close().
  struct Core {
    std::unique_ptr<Sender> sender;
    std::vector<std::shared_ptr<std::mutex>> turns;  // of the trackers, in the order in which to lock them
    std::vector<std::unique_lock<std::mutex>> take_turns() const;
  };
  void end(bool goodbye);
  [[nodiscard]] const std::shared_ptr<Core>& core() const;  // throws CodedError (CLOSED)

  Napi::Value connect(const Napi::CallbackInfo& info);
  Napi::Value queue_populated(const Napi::CallbackInfo& info);
  Napi::Value queue_dirty(const Napi::CallbackInfo& info);
  Napi::Value queue_dirty_sync(const Napi::CallbackInfo& info);
  Napi::Value start_round(const Napi::CallbackInfo& info);
  Napi::Value probe(const Napi::CallbackInfo& info);
  Napi::Value told_growth(const Napi::CallbackInfo& info);
  Napi::Value compare_base(const Napi::CallbackInfo& info);
  Napi::Value end_base(const Napi::CallbackInfo& info);
  Napi::Value discard_dirty(const Napi::CallbackInfo& info);
  Napi::Value switch_over(const Napi::CallbackInfo& info);
  Napi::Value start_push(const Napi::CallbackInfo& info);
  Napi::Value hold_eviction(const Napi::CallbackInfo& info);
  Napi::Value give_up_server(const Napi::CallbackInfo& info);
  Napi::Value set_bandwidth(const Napi::CallbackInfo& info);
  Napi::Value stats(const Napi::CallbackInfo& info);
  Napi::Value digest(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);

  std::shared_ptr<Core> core_;
  std::shared_ptr<EventQueue> events_;
  std::vector<RegionHold> holds_;
  bool open_ = false;
};

class ReceiverHandle : public Napi::ObjectWrap<ReceiverHandle>, public Engine {
 public:
  static void define(Napi::Env env);
  static Napi::Value create(const Napi::CallbackInfo& info);
  static std::shared_ptr<Receiver> receiver_of(const Napi::Value& value);
  explicit ReceiverHandle(const Napi::CallbackInfo& info);
  ~ReceiverHandle() override;
  void shut_down() override;

 private:
  [[nodiscard]] Receiver& receiver() const { return *receiver_; }

  Napi::Value seal(const Napi::CallbackInfo& info);
  Napi::Value paging(const Napi::CallbackInfo& info);
  Napi::Value stats(const Napi::CallbackInfo& info);
  Napi::Value missing(const Napi::CallbackInfo& info);
  Napi::Value reach(const Napi::CallbackInfo& info);
  Napi::Value digest(const Napi::CallbackInfo& info);
  Napi::Value acknowledge_loss(const Napi::CallbackInfo& info);
  Napi::Value base_sampled(const Napi::CallbackInfo& info);
  Napi::Value base_ready(const Napi::CallbackInfo& info);
  Napi::Value await_filled(const Napi::CallbackInfo& info);
  Napi::Value source_rests(const Napi::CallbackInfo& info);
  Napi::Value limit(const Napi::CallbackInfo& info);
  Napi::Value grow(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);

  std::shared_ptr<Receiver> receiver_;  // kept after close() for its last figures
  std::shared_ptr<EventQueue> events_;
  std::vector<RegionHold> holds_;
  bool open_ = false;
};

class ListenerHandle : public Napi::ObjectWrap<ListenerHandle>, public Engine {
 public:
  static void define(Napi::Env env);
  static Napi::Value create(const Napi::CallbackInfo& info);
  explicit ListenerHandle(const Napi::CallbackInfo& info);
  ~ListenerHandle() override;
  void shut_down() override;

 private:
  [[nodiscard]] Listener& listener() const;  // throws CodedError (CLOSED)

  Napi::Value port(const Napi::CallbackInfo& info);
  Napi::Value add(const Napi::CallbackInfo& info);
  Napi::Value remove(const Napi::CallbackInfo& info);
  Napi::Value serve_stage(const Napi::CallbackInfo& info);
  Napi::Value keep_share(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);

  std::unique_ptr<Listener> listener_;
  std::shared_ptr<KnownPages> known_;
  std::shared_ptr<EventQueue> controls_;
  std::uint16_t port_ = 0;
  bool open_ = false;
};

}  // namespace memferry::bind
