// The VMD servers that hold a part of a guest on its way in, as its arrival needs them: opened before anything is
// promised, and then, each when the arrival says so, told that the guest runs here, asked for its digests, told to let go.
//
// Threads: one of its own (mf-images) for what comes after the opening, since a server may take its time. What is public
// may be called from any.
#pragma once

#include <functional>
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
  // `heard`: from mf-images, what ask_digests() asked for; none where nobody knows. Throws nothing.
  ArrivalImages(const Offer& offer, const Key& session, VmdOptions options,
                std::function<void(Digests)> heard);
  ~ArrivalImages();  // close()
  ArrivalImages(const ArrivalImages&) = delete;
  ArrivalImages& operator=(const ArrivalImages&) = delete;

  [[nodiscard]] std::vector<StageServer> servers() const { return image_.servers(); }
  // Those return at once and cannot fail.
  // The guest runs here: no lease ends the image any more.
  void commit() noexcept;
  void ask_digests() noexcept;
  // Nobody needs it any more. Twice is fine.
  void dissolve() noexcept;
  // What was asked for is done first, in bounded time.
  void close();

 private:
  struct Wanted {
    bool commit = false;
    bool digests = false;
    bool dissolve = false;
  };
  void want(bool Wanted::*what) noexcept;
  void run(WorkerThread& self);

  const std::function<void(Digests)> heard_;
  std::mutex mutex_;  // guards wanted_
  Wanted wanted_;

  StagedImage image_;  // the thread's, once it runs
  WorkerThread thread_;
};

}  // namespace memferry::control
