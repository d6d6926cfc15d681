#include "control/arrival_images.h"

#include <new>
#include <utility>

namespace memferry::control {

ArrivalImages::ArrivalImages(const Offer& offer, const Key& session, VmdOptions options,
                             std::function<void(Digests)> heard)
    : heard_(std::move(heard)),
      image_(offer.id, unseal(session, offer.migration, offer.scatter.value().sealed_secret, "memferry seal"),
             std::move(options)) {
  // What only one that is away has would be lost before the guest has run at all.
  image_.open(offer.scatter.value().servers, StagedImage::Required::kAll);
  thread_.start("mf-images", [this](WorkerThread& self) { run(self); });
}

ArrivalImages::~ArrivalImages() { close(); }

void ArrivalImages::close() { thread_.stop(); }

void ArrivalImages::want(bool Wanted::*what) noexcept {
  {
    const std::lock_guard lock(mutex_);
    wanted_.*what = true;
  }
  thread_.wake();
}

void ArrivalImages::commit() noexcept { want(&Wanted::commit); }

void ArrivalImages::ask_digests() noexcept { want(&Wanted::digests); }

void ArrivalImages::dissolve() noexcept { want(&Wanted::dissolve); }

void ArrivalImages::run(WorkerThread& self) {
  bool dissolved = false;
  for (bool last = false; !last;) {
    (void)self.wait(-1);
    // Before the look at what is wanted: what was asked for before close() is done.
    last = self.stopping();
    Wanted now;
    {
      const std::lock_guard lock(mutex_);
      now = std::exchange(wanted_, {});
    }
    if (dissolved) continue;
    dissolved = now.dissolve;
    try {
      if (now.commit) image_.commit(0);
      if (now.digests) heard_(image_.digests());
      if (now.dissolve) (void)image_.dissolve(0);
    } catch (const std::bad_alloc&) {
      // As if no server could be asked.
    }
  }
}

}  // namespace memferry::control
