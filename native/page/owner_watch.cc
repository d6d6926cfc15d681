#include "page/owner_watch.h"

#include <poll.h>

#include <array>
#include <utility>

namespace memferry {
namespace {

constexpr int kBusyMs = 20;  // somebody else reads the events

}  // namespace

OwnerWatch::OwnerWatch(const std::shared_ptr<Region>& region, std::function<void(const std::string&)> gone,
                       std::chrono::milliseconds look_every)
    : region_(region), owner_(region->owner()), gone_(std::move(gone)), look_every_(look_every) {
  const Userfaultfd* const uffd = region->uffd();
  // Faults alone can wait: whoever pages has them raised again.
  constexpr std::uint64_t kEvents = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP |
                                    UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP;
  if (uffd != nullptr && (uffd->enabled() & kEvents) != 0) events_ = duplicate(uffd->fd());
  thread_.start("mf-owner", [this](WorkerThread& self) { run(self); });
}

void OwnerWatch::run(WorkerThread& self) {
  std::array<pollfd, 3> waiting{pollfd{self.wake_fd(), POLLIN, 0}, pollfd{owner_->pidfd(), POLLIN, 0},
                                pollfd{events_.get(), POLLIN, 0}};
  bool others_read = false;
  while (!self.stopping()) {
    const nfds_t count = events_ && !others_read ? 3 : 2;
    waiting[2].revents = 0;
    (void)::poll(waiting.data(), count, others_read ? kBusyMs : static_cast<int>(look_every_.count()));
    if (self.stopping()) return;
    if ((waiting[0].revents & POLLIN) != 0) self.drain_wake();
    const std::shared_ptr<Region> region = region_.lock();
    if (!region) return;
    others_read = false;
    if ((waiting[2].revents & POLLIN) != 0) {
      try {
        others_read = !region->drain_events();
      } catch (const SystemError&) {
        others_read = true;
      }
    } else if ((waiting[2].revents & (POLLERR | POLLHUP)) != 0) {
      others_read = true;
    }
    if (owner_->alive()) continue;
    region->retire();
    if (gone_) gone_(owner_->gone("attach").what());
    return;
  }
}

}  // namespace memferry
