#include "control/arrival_images.h"

#include <utility>

namespace memferry::control {

ArrivalImages::ArrivalImages(const Offer& offer, const Key& session, VmdOptions options)
    : image_(offer.id, unseal(session, offer.migration, offer.scatter.value().sealed_secret, "memferry seal"),
             std::move(options)) {
  // What only one that is away has would be lost before the guest has run at all.
  image_.open(offer.scatter.value().servers, StagedImage::Required::kAll);
  thread_.start("mf-images", [this](WorkerThread& self) { run(self); });
}

ArrivalImages::~ArrivalImages() { close(); }

void ArrivalImages::close() { thread_.stop(); }

void ArrivalImages::enqueue(std::function<void()> task) {
  {
    const std::lock_guard lock(mutex_);
    tasks_.push_back(std::move(task));
  }
  thread_.wake();
}

void ArrivalImages::run(WorkerThread& self) {
  for (;;) {
    // Before the look at what there is: what was asked for before close() is done.
    const bool last = self.stopping();
    std::deque<std::function<void()>> tasks;
    {
      const std::lock_guard lock(mutex_);
      tasks.swap(tasks_);
    }
    for (const auto& task : tasks) task();
    if (last) return;
    if (tasks.empty()) (void)self.wait(-1);
  }
}

void ArrivalImages::commit() {
  enqueue([this] { image_.commit(0); });
}

void ArrivalImages::ask_digests(std::function<void(Digests)> heard) {
  enqueue([this, heard = std::move(heard)] { heard(image_.digests()); });
}

void ArrivalImages::dissolve() {
  {
    const std::lock_guard lock(mutex_);
    if (std::exchange(dissolving_, true)) return;
  }
  enqueue([this] { (void)image_.dissolve(0); });
}

}  // namespace memferry::control
