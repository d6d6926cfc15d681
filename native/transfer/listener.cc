#include "transfer/listener.h"

#include <sys/epoll.h>
#include <sys/socket.h>

#include <array>
#include <cstring>
#include <list>
#include <map>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

#include "os/sys_error.h"
#include "os/worker_thread.h"
#include "stage/stage.h"
#include "transfer/receiver.h"
#include "wire/hello.h"
#include "wire/socket.h"

namespace memferry {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::uint64_t kListening = 0;  // keys of epoll; connections count from kFirstConnection
constexpr std::uint64_t kWake = 1;
constexpr std::uint64_t kFirstConnection = 2;
constexpr std::size_t kEventsAtOnce = 64;
// Before looking at those already there again.
constexpr int kAcceptsAtOnce = 64;
// No descriptor or memory for another connection, and none to give up: the queue of the kernel holds them.
constexpr std::chrono::milliseconds kAcceptPause{100};

}  // namespace

struct Listener::Impl {
  // A connection that has not said who it is.
  struct Pending {
    std::uint64_t key = 0;
    UniqueFd fd;
    Clock::time_point deadline;
    std::array<std::byte, sizeof(wire::Hello)> bytes;
    std::size_t have = 0;
  };
  using Entry = std::list<Pending>::iterator;

  explicit Impl(Config config_in) : config(std::move(config_in)) {
    listening = wire::listen_on(wire::SocketAddress::parse(config.host, config.port));
    port = wire::SocketAddress::local(listening.get()).port();
    epoll.reset(::epoll_create1(EPOLL_CLOEXEC));
    if (!epoll) throw_errno("epoll_create1");
    watch(listening.get(), kListening);
    thread.start("mf-listener", [this](WorkerThread& self) { run(self); });
  }

  void watch(int fd, std::uint64_t key) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.u64 = key;
    if (::epoll_ctl(epoll.get(), EPOLL_CTL_ADD, fd, &event) != 0) throw_errno("epoll_ctl");
  }

  void run(WorkerThread& self) {
    watch(self.wake_fd(), kWake);
    std::array<epoll_event, kEventsAtOnce> ready;
    while (!self.stopping()) {
      const int count = ::epoll_wait(epoll.get(), ready.data(), static_cast<int>(ready.size()), timeout_ms());
      for (int i = 0; i < count; ++i) {
        const std::uint64_t key = ready[static_cast<std::size_t>(i)].data.u64;
        if (key == kWake) {
          self.drain_wake();
        } else if (key == kListening) {
          accept_some();
        } else if (const auto found = by_key.find(key); found != by_key.end()) {
          hear(found->second);
        }
      }
      const Clock::time_point now = Clock::now();
      while (!pending.empty() && pending.front().deadline <= now) drop(pending.begin());
      if (accept_again != Clock::time_point::max() && accept_again <= now) listen_again();
    }
  }

  [[nodiscard]] int timeout_ms() const {
    Clock::time_point until = accept_again;
    if (!pending.empty()) until = std::min(until, pending.front().deadline);
    if (until == Clock::time_point::max()) return -1;
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(until - Clock::now()).count();
    return static_cast<int>(std::max<std::int64_t>(left, 0));
  }

  void accept_some() {
    for (int i = 0; i < kAcceptsAtOnce; ++i) {
      UniqueFd fd(::accept4(listening.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
      if (!fd) {
        const bool exhausted = errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM;
        if (!exhausted) return;  // none left, or one that has gone already: epoll tells of the next
        if (!pending.empty()) {
          make_room();
          continue;
        }
        // Left in epoll, the waiting connection would make this thread spin.
        pause_accepting();
        return;
      }
      if (pending.size() >= kMaxPending) make_room();
      pending.emplace_back();
      const Entry entry = std::prev(pending.end());
      entry->key = next_key++;
      entry->deadline = Clock::now() + kHelloTimeout;
      const int number = fd.get();
      entry->fd = std::move(fd);
      by_key.emplace(entry->key, entry);
      try {
        watch(number, entry->key);
      } catch (const SystemError&) {
        drop(entry);
        continue;
      }
      hear(entry);  // who speaks at once is never among those to be dropped
    }
  }

  // The oldest goes, unless what it has sent meanwhile says who it is.
  void make_room() {
    const std::uint64_t oldest = pending.front().key;
    hear(pending.begin());
    if (!pending.empty() && pending.front().key == oldest) drop(pending.begin());
  }

  void pause_accepting() {
    epoll_event nothing{};
    nothing.data.u64 = kListening;
    ::epoll_ctl(epoll.get(), EPOLL_CTL_MOD, listening.get(), &nothing);
    accept_again = Clock::now() + kAcceptPause;
  }

  void listen_again() {
    accept_again = Clock::time_point::max();
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.u64 = kListening;
    ::epoll_ctl(epoll.get(), EPOLL_CTL_MOD, listening.get(), &event);
  }

  void drop(Entry entry) {
    by_key.erase(entry->key);
    pending.erase(entry);  // closing takes it out of epoll
  }

  UniqueFd take(Entry entry) {
    ::epoll_ctl(epoll.get(), EPOLL_CTL_DEL, entry->fd.get(), nullptr);
    UniqueFd fd = std::move(entry->fd);
    drop(entry);
    return fd;
  }

  // Reads what is there, never beyond what this listener understands: the bytes behind a control
  // connection's preface belong to its new owner.
  void hear(Entry entry) {
    for (;;) {
      const std::size_t wanted =
          entry->have < wire::kDataPreface.size() ? wire::kDataPreface.size() : sizeof(wire::Hello);
      const ssize_t got = ::recv(entry->fd.get(), entry->bytes.data() + entry->have, wanted - entry->have, 0);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
      if (got <= 0) {
        drop(entry);
        return;
      }
      entry->have += static_cast<std::size_t>(got);
      if (entry->have == wire::kDataPreface.size()) {
        if (std::memcmp(entry->bytes.data(), wire::kControlPreface.data(), entry->have) == 0) {
          hand_over_control(take(entry));
          return;
        }
        if (!expects_hello(entry->bytes.data())) {
          drop(entry);
          return;
        }
      } else if (entry->have == sizeof(wire::Hello)) {
        wire::Hello hello;
        std::memcpy(&hello, entry->bytes.data(), sizeof hello);
        introduce(hello, take(entry));
        return;
      }
    }
  }

  // A stage's preface means nothing where there is none.
  bool expects_hello(const std::byte* preface) {
    if (std::memcmp(preface, wire::kDataPreface.data(), wire::kDataPreface.size()) == 0) return true;
    if (std::memcmp(preface, wire::kStagePreface.data(), wire::kStagePreface.size()) != 0) return false;
    const std::lock_guard lock(mutex);
    return stage != nullptr;
  }

  void hand_over_control(UniqueFd fd) {
    if (!config.on_control) return;
    try {
      const std::string peer = wire::SocketAddress::peer(fd.get()).describe();
      config.on_control(std::move(fd), peer);
    } catch (const std::exception&) {
      // Gone already, or the owner cannot take it: closed.
    }
  }

  void introduce(const wire::Hello& hello, UniqueFd fd) {
    wire::HelloStatus status = wire::HelloStatus::kRefused;
    try {
      status = hello.preface == wire::kStagePreface ? to_stage(hello, fd) : to_receiver(hello, fd);
    } catch (const std::exception&) {
      // No memory for a token, or for its connection.
    }
    if (status != wire::HelloStatus::kAccepted && fd) wire::turn_away(fd.get(), status);
  }

  // A version that is not ours, an unknown migration and a wrong token get the same answer.
  wire::HelloStatus to_receiver(const wire::Hello& hello, UniqueFd& fd) {
    std::shared_ptr<Receiver> receiver;
    {
      const std::lock_guard lock(mutex);
      const auto found = receivers.find(hello.migration);
      if (found != receivers.end()) receiver = found->second;
    }
    const bool attached = hello.version == wire::kVersion && receiver && receiver->attach(hello, fd);
    return attached ? wire::HelloStatus::kAccepted : wire::HelloStatus::kRefused;
  }

  wire::HelloStatus to_stage(const wire::Hello& hello, UniqueFd& fd) {
    std::shared_ptr<Stage> to;
    {
      const std::lock_guard lock(mutex);
      to = stage;
    }
    return to ? to->attach(hello, fd) : wire::HelloStatus::kRefused;
  }

  Config config;
  UniqueFd listening;
  UniqueFd epoll;
  std::uint16_t port = 0;
  // The thread's own. Oldest first, which is also the order of their deadlines.
  std::list<Pending> pending;
  std::unordered_map<std::uint64_t, Entry> by_key;
  std::uint64_t next_key = kFirstConnection;
  Clock::time_point accept_again = Clock::time_point::max();

  std::mutex mutex;  // guards the two below, and is not held while one of them is called
  std::map<wire::MigrationId, std::shared_ptr<Receiver>> receivers;
  std::shared_ptr<Stage> stage;
  WorkerThread thread;
};

Listener::Listener(Config config) : impl_(std::make_unique<Impl>(std::move(config))) {}
Listener::~Listener() { close(); }

std::uint16_t Listener::port() const { return impl_->port; }

void Listener::add(std::shared_ptr<Receiver> receiver) {
  const wire::MigrationId migration = receiver->migration();
  const std::lock_guard lock(impl_->mutex);
  if (!impl_->receivers.emplace(migration, std::move(receiver)).second) {
    throw std::invalid_argument("a receiver for this migration is there already");
  }
}

void Listener::remove(const wire::MigrationId& migration) {
  std::shared_ptr<Receiver> removed;  // its end may take time, and is none of the lock's business
  const std::lock_guard lock(impl_->mutex);
  const auto found = impl_->receivers.find(migration);
  if (found == impl_->receivers.end()) return;
  removed = std::move(found->second);
  impl_->receivers.erase(found);
}

void Listener::serve_stage(std::shared_ptr<Stage> stage) {
  const std::lock_guard lock(impl_->mutex);
  impl_->stage.swap(stage);
}

void Listener::close() {
  impl_->thread.stop();
  impl_->by_key.clear();
  impl_->pending.clear();
  impl_->listening.reset();
  // Destroyed after the lock is let go.
  std::map<wire::MigrationId, std::shared_ptr<Receiver>> removed;
  std::shared_ptr<Stage> stage;
  const std::lock_guard lock(impl_->mutex);
  removed.swap(impl_->receivers);
  stage.swap(impl_->stage);
}

}  // namespace memferry
