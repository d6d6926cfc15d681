#include <atomic>
#include <limits>
#include <memory>
#include <string>
#include <utility>

#include "bind/engine_handles.h"
#include "bind/js_error.h"
#include "bind/stage_handle.h"
#include "bind/values.h"

namespace memferry::bind {
namespace {

// Connections that wait for JavaScript, which may be blocked for long: anybody can make them, and each is a descriptor.
constexpr std::size_t kMostUntaken = 256;

// One of them. The descriptor closes with it when JavaScript is not there to take it.
class Untaken {
 public:
  Untaken(UniqueFd fd, std::shared_ptr<std::atomic<std::size_t>> count)
      : fd_(std::move(fd)), count_(std::move(count)) {
    count_->fetch_add(1);
  }
  ~Untaken() { count_->fetch_sub(1); }
  Untaken(const Untaken&) = delete;
  Untaken& operator=(const Untaken&) = delete;
  [[nodiscard]] int get() const { return fd_.get(); }
  void release() { (void)fd_.release(); }

 private:
  UniqueFd fd_;
  const std::shared_ptr<std::atomic<std::size_t>> count_;
};

}  // namespace

void ListenerHandle::define(Napi::Env env) {
  const Napi::Function constructor =
      DefineClass(env, "NativeListener",
                  {
                      InstanceAccessor<&ListenerHandle::port>("port"),
                      InstanceMethod<&ListenerHandle::add>("add"),
                      InstanceMethod<&ListenerHandle::remove>("remove"),
                      InstanceMethod<&ListenerHandle::serve_stage>("serveStage"),
                      InstanceMethod<&ListenerHandle::keep_share>("keepShare"),
                      InstanceMethod<&ListenerHandle::close>("close"),
                  });
  Environment::of(env).listener_class = Napi::Persistent(constructor);
}

Napi::Value ListenerHandle::create(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    return Environment::of(info.Env()).listener_class.New({info[0], info[1], info[2]});
  });
}

ListenerHandle::ListenerHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<ListenerHandle>(info) {
  const Napi::Env env = info.Env();
  guarded(env, [&] {
    Listener::Config config;
    config.host = text_of(info[0], "host");
    const std::uint64_t port = count_of(info[1], "port");
    if (port > std::numeric_limits<std::uint16_t>::max()) throw std::invalid_argument("port: not a port");
    config.port = static_cast<std::uint16_t>(port);
    controls_ = EventQueue::create(env, function_of(info[2], "onControl"), "memferry.listener");
    auto untaken = std::make_shared<std::atomic<std::size_t>>(0);
    config.on_control = [controls = controls_, untaken](UniqueFd fd, std::string peer) {
      // Only this thread adds to them.
      if (*untaken >= kMostUntaken) return;
      // Shared, because a std::function is copied.
      auto connection = std::make_shared<Untaken>(std::move(fd), untaken);
      controls->post([connection, peer = std::move(peer)](Napi::Env js, const Napi::Function& callback) {
        const Napi::Number number = Napi::Number::New(js, connection->get());
        const Napi::String address = Napi::String::New(js, peer);
        // The callee owns it from the call on, even if it throws.
        connection->release();
        callback.Call({number, address});
      });
    };
    try {
      listener_ = std::make_unique<Listener>(std::move(config));
      Environment::of(env).add(this);
    } catch (...) {
      controls_->close();
      throw;
    }
    port_ = listener_->port();
    open_ = true;
    Ref();
  });
}

ListenerHandle::~ListenerHandle() { shut_down(); }

void ListenerHandle::shut_down() {
  if (!open_) return;
  open_ = false;
  controls_->close();
  listener_->close();
  known_ = nullptr;
}

Listener& ListenerHandle::listener() const {
  if (!open_) throw CodedError("CLOSED", "the listener is closed");
  return *listener_;
}

Napi::Value ListenerHandle::port(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), port_);
}

Napi::Value ListenerHandle::add(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    listener().add(ReceiverHandle::receiver_of(info[0]));
    return info.Env().Undefined();
  });
}

Napi::Value ListenerHandle::remove(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const auto migration = fixed_bytes_of<sizeof(wire::MigrationId)>(info[0], "migration");
    if (open_) listener().remove(migration);
    return info.Env().Undefined();
  });
}

Napi::Value ListenerHandle::serve_stage(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    listener().serve_stage(StageHandle::stage_of(info[0]));
    return info.Env().Undefined();
  });
}

Napi::Value ListenerHandle::keep_share(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    (void)listener();
    known_ =
        KnownPages::of_domain(fixed_bytes_of<sizeof(ContentKey)>(info[0], "key"), text_of(info[1], "share"));
    return info.Env().Undefined();
  });
}

Napi::Value ListenerHandle::close(const Napi::CallbackInfo& info) {
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
