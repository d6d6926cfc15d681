// NativeFdListener and NativeFdConnection: unix sockets that carry descriptors, as handles. An open handle is never
// collected: it lives until it is closed, or its environment ends. Descriptors on their way to JavaScript are closed
// when JavaScript is not there to take them.
//
// Thread: the environment's own. Waiting happens on threads of the handles' own, sending on one of the pool.
#pragma once

#include <atomic>
#include <memory>

#include "bind/environment.h"
#include "bind/event_queue.h"
#include "bind/node_api.h"
#include "os/fd_channel.h"
#include "os/worker_thread.h"

namespace memferry::bind {

class FdConnectionHandle : public Napi::ObjectWrap<FdConnectionHandle>, public Engine {
 public:
  // Counts the connections of a listener that are open.
  using Seats = std::shared_ptr<std::atomic<std::uint32_t>>;
  // Shared with a send on the pool, which may outlast close().
  struct Core {
    Core(FdConnection opened, Seats taken) : connection(std::move(opened)), seats(std::move(taken)) {}
    ~Core() {
      if (seats) seats->fetch_sub(1, std::memory_order_relaxed);
    }
    Core(const Core&) = delete;
    Core& operator=(const Core&) = delete;
    FdConnection connection;
    Seats seats;
  };

  static void define(Napi::Env env);
  static Napi::Value connect(const Napi::CallbackInfo& info);
  static Napi::Value peer_of_descriptor(const Napi::CallbackInfo& info);
  static Napi::Object make(Napi::Env env, const std::shared_ptr<Core>& core);
  explicit FdConnectionHandle(const Napi::CallbackInfo& info);
  ~FdConnectionHandle() override;
  void shut_down() override;

 private:
  [[nodiscard]] const std::shared_ptr<Core>& core() const;  // throws CodedError (CLOSED)

  Napi::Value peer(const Napi::CallbackInfo& info);
  Napi::Value on_received(const Napi::CallbackInfo& info);
  Napi::Value receive(const Napi::CallbackInfo& info);
  Napi::Value send(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);

  std::shared_ptr<Core> core_;
  std::shared_ptr<EventQueue> events_;
  std::shared_ptr<bool> receiving_ =
      std::make_shared<bool>(false);        // touched on the environment's thread alone
  std::unique_ptr<WorkerThread> receiver_;  // of the receive under way, or the last one
  bool open_ = false;
};

class FdListenerHandle : public Napi::ObjectWrap<FdListenerHandle>, public Engine {
 public:
  static void define(Napi::Env env);
  static Napi::Value create(const Napi::CallbackInfo& info);
  explicit FdListenerHandle(const Napi::CallbackInfo& info);
  ~FdListenerHandle() override;
  void shut_down() override;

 private:
  Napi::Value close(const Napi::CallbackInfo& info);

  std::shared_ptr<EventQueue> events_;
  std::unique_ptr<FdListener> listener_;
  std::unique_ptr<WorkerThread> acceptor_;
  bool open_ = false;
};

}  // namespace memferry::bind
