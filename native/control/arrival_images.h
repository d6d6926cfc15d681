// The VMD servers that hold a part of a guest on its way in, as its arrival needs them: opened before anything is
// promised, and then, each when the arrival says so, told that the guest runs here, asked for its digests, told to let go.
//
// Threads: one of its own (mf-images) for what comes after the opening, since a server may take its time. What is public
// may be called from any.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "control/staged_image.h"
#include "os/worker_thread.h"

namespace memferry::control {

class ArrivalImages {
 public:
  using Digests = std::optional<std::vector<std::string>>;

  // `offer` with a scatter. Opens the image at every server of it; throws Failure: one cannot be reached, ...
  ArrivalImages(const Offer& offer, const Key& session, VmdOptions options);
  ~ArrivalImages();  // close()
  ArrivalImages(const ArrivalImages&) = delete;
  ArrivalImages& operator=(const ArrivalImages&) = delete;

  [[nodiscard]] std::vector<StageServer> servers() const { return image_.servers(); }
  // The guest runs here: no lease ends the image any more.
  void commit();
  // `heard`: from mf-images, once.
  void ask_digests(std::function<void(Digests)> heard);
  // Nobody needs it any more. Twice is fine.
  void dissolve();
  // What was asked for is done first, in bounded time.
  void close();

 private:
  void enqueue(std::function<void()> task);
  void run(WorkerThread& self);

  std::mutex mutex_;  // guards the two below
  std::deque<std::function<void()>>
      tasks_;  // a commit, a dissolve, and a question each time the source is cut off
  bool dissolving_ = false;

  StagedImage image_;  // the thread's, once it runs
  WorkerThread thread_;
};

}  // namespace memferry::control
