// The copies that an owner's children have of memory with missing pages, while a pager brings those to the owner. At once,
// what is missing fails to be read in the child. Private memory needs no more: the failing is handed down to children of
// its own, and what it discards is zeros. A mapping of a shared file is made afresh for each child, without what fails
// there, so that it is watched for as long as there are missing pages: whoever let go of it would make holes in the file
// read as zeros, and the owner's own pages with them.
//
// Where something cannot be made to fail, the child waits there.
//
// Threads: add() from one; one of its own, which calls `missing` too.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "os/worker_thread.h"
#include "page/forked_copy.h"

namespace memferry {

class ForkedCopies {
 public:
  using Visit = std::function<void(OwnerAddress start, std::uint64_t bytes)>;
  using PageBytes = std::function<std::uint64_t(OwnerAddress at)>;
  // `missing` visits what is missing now, in whole pages of those sizes. `shared`: some of it is of a file.
  ForkedCopies(std::function<void(const Visit&)> missing, bool shared, PageBytes page_bytes)
      : missing_(std::move(missing)), shared_(shared), page_bytes_(std::move(page_bytes)) {}
  ~ForkedCopies();
  ForkedCopies(const ForkedCopies&) = delete;
  ForkedCopies& operator=(const ForkedCopies&) = delete;

  void add(UniqueFd child);
  [[nodiscard]] std::size_t kept() const;

 private:
  struct Kept {
    std::unique_ptr<ForkedCopy> copy;
    bool waits = false;  // not all of it could be made to fail
    bool fresh = true;   // not looked at since it was kept
    std::atomic<bool> dead = false;
  };
  void run(WorkerThread& self);
  void look(Kept& kept);
  [[nodiscard]] ForkedCopy::Around around(OwnerAddress at) const;
  void prune();

  const std::function<void(const Visit&)> missing_;
  const bool shared_;
  const PageBytes page_bytes_;
  mutable std::mutex mutex_;  // guards the next two
  std::vector<std::shared_ptr<Kept>> kept_;
  bool started_ = false;
  WorkerThread thread_;
};

}  // namespace memferry
