#include "bind/fd_channel_handle.h"

#include <fcntl.h>

#include <cerrno>
#include <exception>
#include <utility>
#include <vector>

#include "bind/async_work.h"
#include "bind/js_error.h"
#include "bind/values.h"
#include "os/sys_error.h"

namespace memferry::bind {

namespace {

// A receive() by its end: what came, or why it failed.
struct Arrived {
  FdConnection::Received received;
  std::exception_ptr failure;
};

// From here on the descriptors are JavaScript's.
Napi::Array release_descriptors(Napi::Env env, std::vector<UniqueFd>& descriptors) {
  Napi::Array numbers = Napi::Array::New(env, descriptors.size());
  for (std::size_t i = 0; i < descriptors.size(); ++i)
    numbers.Set(static_cast<std::uint32_t>(i), Napi::Number::New(env, descriptors[i].get()));
  for (UniqueFd& descriptor : descriptors) (void)descriptor.release();
  return numbers;
}

void deliver(Napi::Env env, const Napi::Function& callback, Arrived& arrived) {
  if (arrived.failure) {
    callback.Call({to_js_error(env, arrived.failure).Value(), env.Null(), env.Null(), env.Null()});
    return;
  }
  FdConnection::Received& received = arrived.received;
  const Napi::Buffer<std::uint8_t> bytes = Napi::Buffer<std::uint8_t>::Copy(
      env, reinterpret_cast<const std::uint8_t*>(received.bytes.data()), received.bytes.size());
  const Napi::String outcome = Napi::String::New(env, fd_outcome_name(received.outcome));
  callback.Call({env.Null(), outcome, bytes, release_descriptors(env, received.descriptors)});
}

}  // namespace

void FdConnectionHandle::define(Napi::Env env) {
  const Napi::Function constructor =
      DefineClass(env, "NativeFdConnection",
                  {
                      InstanceMethod<&FdConnectionHandle::peer>("peer"),
                      InstanceMethod<&FdConnectionHandle::on_received>("onReceived"),
                      InstanceMethod<&FdConnectionHandle::receive>("receive"),
                      InstanceMethod<&FdConnectionHandle::send>("send"),
                      InstanceMethod<&FdConnectionHandle::close>("close"),
                  });
  Environment::of(env).fd_connection_class = Napi::Persistent(constructor);
}

Napi::Object FdConnectionHandle::make(Napi::Env env, const std::shared_ptr<Core>& core) {
  std::shared_ptr<Core> handed = core;
  return Environment::of(env).fd_connection_class.New(
      {Napi::External<std::shared_ptr<Core>>::New(env, &handed)});
}

Napi::Value FdConnectionHandle::connect(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&] {
    return run_async(
        env, "memferry.fd-connect",
        [path = text_of(info[0], "path"), timeout = milliseconds_of(info[1], "timeoutMs")] {
          return std::make_shared<Core>(FdConnection::connect(path, timeout), nullptr);
        },
        [](Napi::Env js, const std::shared_ptr<Core>& core) -> Napi::Value { return make(js, core); });
  });
}

Napi::Value FdConnectionHandle::peer_of_descriptor(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    return Napi::Number::New(env, peer_pid(static_cast<int>(count_of(info[0], "fd"))));
  });
}

FdConnectionHandle::FdConnectionHandle(const Napi::CallbackInfo& info)
    : Napi::ObjectWrap<FdConnectionHandle>(info) {
  guarded(info.Env(), [&] {
    if (!info[0].IsExternal())
      throw std::invalid_argument("NativeFdConnection: made by connect or accept only");
    core_ = *info[0].As<Napi::External<std::shared_ptr<Core>>>().Data();
    Environment::of(info.Env()).add(this);
    open_ = true;
    Ref();
  });
}

FdConnectionHandle::~FdConnectionHandle() { shut_down(); }

void FdConnectionHandle::shut_down() {
  if (!open_) return;
  open_ = false;
  core_->connection.shut_down();
  receiver_.reset();
  if (events_) events_->close();
  core_.reset();
}

const std::shared_ptr<FdConnectionHandle::Core>& FdConnectionHandle::core() const {
  if (!open_) throw CodedError("CLOSED", "the connection is closed");
  return core_;
}

Napi::Value FdConnectionHandle::peer(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const SocketPeer& peer = core()->connection.peer();
    Napi::Object object = Napi::Object::New(env);
    object.Set("pid", Napi::Number::New(env, peer.pid));
    object.Set("uid", Napi::Number::New(env, peer.uid));
    object.Set("gid", Napi::Number::New(env, peer.gid));
    object.Set("pidfd", peer.pidfd ? Napi::Number::New(env, peer.pidfd.get()) : env.Null());
    return object;
  });
}

Napi::Value FdConnectionHandle::on_received(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&] {
    (void)core();
    if (events_) throw CodedError("INVALID_ARGUMENT", "onReceived: there is a callback already");
    events_ = EventQueue::create(env, function_of(info[0], "onReceived"), "memferry.fd-connection");
    return env.Undefined();
  });
}

Napi::Value FdConnectionHandle::receive(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&] {
    std::shared_ptr<Core> taken = core();
    if (!events_ || *receiving_)
      throw CodedError("INVALID_ARGUMENT", "receive: no callback, or one at a time");
    const std::uint64_t most_bytes = count_of(info[0], "mostBytes");
    const std::uint64_t most_descriptors = count_of(info[1], "mostDescriptors");
    const auto timeout = milliseconds_of(info[2], "timeoutMs");
    receiver_ = std::make_unique<WorkerThread>(
        "memferry.fds", [taken, most_bytes, most_descriptors, timeout, events = events_,
                         receiving = receiving_](WorkerThread&) {
          auto arrived = std::make_shared<Arrived>();
          try {
            arrived->received = taken->connection.receive(most_bytes, most_descriptors, timeout);
          } catch (...) {
            arrived->failure = std::current_exception();
          }
          events->post([arrived, receiving](Napi::Env js, const Napi::Function& callback) {
            *receiving = false;
            deliver(js, callback, *arrived);
          });
        });
    *receiving_ = true;
    return env.Undefined();
  });
}

Napi::Value FdConnectionHandle::send(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&] {
    const std::span<std::byte> bytes = bytes_of(info[0], "bytes");
    const Napi::Array numbers = array_of(info[1], "descriptors");
    // Duplicates: the caller may close his at once, and a number that is none is found now.
    auto descriptors = std::make_shared<std::vector<UniqueFd>>();
    for (std::uint32_t i = 0; i < numbers.Length(); ++i) {
      const std::uint32_t fd = index_of(numbers.Get(i), "descriptor");
      descriptors->emplace_back(::fcntl(static_cast<int>(fd), F_DUPFD_CLOEXEC, 0));
      if (!descriptors->back()) throw_errno("fcntl(F_DUPFD_CLOEXEC)");
    }
    return run_async(
        env, "memferry.fd-send",
        [taken = core(), copy = std::vector<std::byte>(bytes.begin(), bytes.end()), descriptors,
         timeout = milliseconds_of(info[2], "timeoutMs")] {
          std::vector<int> plain;
          for (const UniqueFd& descriptor : *descriptors) plain.push_back(descriptor.get());
          return taken->connection.send(copy, plain, timeout);
        },
        [](Napi::Env js, FdOutcome outcome) -> Napi::Value {
          return Napi::String::New(js, fd_outcome_name(outcome));
        });
  });
}

Napi::Value FdConnectionHandle::close(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    if (open_) {
      Environment::of(info.Env()).remove(this);
      shut_down();
      Unref();
    }
    return info.Env().Undefined();
  });
}

void FdListenerHandle::define(Napi::Env env) {
  const Napi::Function constructor =
      DefineClass(env, "NativeFdListener", {InstanceMethod<&FdListenerHandle::close>("close")});
  Environment::of(env).fd_listener_class = Napi::Persistent(constructor);
}

Napi::Value FdListenerHandle::create(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    return Environment::of(info.Env()).fd_listener_class.New({info[0], info[1], info[2], info[3]});
  });
}

FdListenerHandle::FdListenerHandle(const Napi::CallbackInfo& info)
    : Napi::ObjectWrap<FdListenerHandle>(info) {
  const Napi::Env env = info.Env();
  guarded(env, [&] {
    const std::string path = text_of(info[0], "path");
    const std::uint32_t mode = index_of(info[1], "mode");
    const std::uint32_t most = index_of(info[2], "mostConnections");
    const Napi::Function callback = function_of(info[3], "onConnection");
    listener_ = std::make_unique<FdListener>(path, mode);
    events_ = EventQueue::create(env, callback, "memferry.fd-listener");
    try {
      auto seats = std::make_shared<std::atomic<std::uint32_t>>(0);
      acceptor_ = std::make_unique<WorkerThread>(
          "memferry.accept", [listener = listener_.get(), events = events_, seats, most](WorkerThread& self) {
            try {
              while (UniqueFd fd = listener->accept(self.wake_fd())) {
                // One too many is closed at once: that end of it reads an end.
                if (seats->load(std::memory_order_relaxed) >= most) continue;
                seats->fetch_add(1, std::memory_order_relaxed);
                std::shared_ptr<FdConnectionHandle::Core> core;
                try {
                  core = std::make_shared<FdConnectionHandle::Core>(FdConnection(std::move(fd)), seats);
                } catch (const std::exception&) {
                  // Out of descriptors or memory: this one is closed, the next may find some.
                  seats->fetch_sub(1, std::memory_order_relaxed);
                  continue;
                }
                events->post([core = std::move(core)](Napi::Env js, const Napi::Function& accepted) {
                  accepted.Call({js.Null(), FdConnectionHandle::make(js, core)});
                });
              }
            } catch (...) {
              events->post([failure = std::current_exception()](Napi::Env js, const Napi::Function& failed) {
                failed.Call({to_js_error(js, failure).Value(), js.Null()});
              });
            }
          });
      Environment::of(env).add(this);
    } catch (...) {
      acceptor_.reset();
      events_->close();
      throw;
    }
    open_ = true;
    Ref();
  });
}

FdListenerHandle::~FdListenerHandle() { shut_down(); }

void FdListenerHandle::shut_down() {
  if (!open_) return;
  open_ = false;
  acceptor_.reset();
  events_->close();
  listener_->close();
}

Napi::Value FdListenerHandle::close(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    if (open_) {
      Environment::of(info.Env()).remove(this);
      shut_down();
      Unref();
    }
    return info.Env().Undefined();
  });
}

}  // namespace memferry::bind
