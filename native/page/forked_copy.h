// The copy of an owner's memory that a child of its fork() has, by the userfaultfd that comes with the event. Nobody brings
// pages there: what is missing is made to fail, and never reads as zeros.
//
// Threads: one at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "os/address.h"
#include "os/unique_fd.h"
#include "os/userfaultfd.h"

namespace memferry {

class ForkedCopy {
 public:
  // Throws SystemError (no userfaultfd).
  explicit ForkedCopy(const UniqueFd& child) : uffd_(Userfaultfd::adopt(child.get(), 0)) {}

  // What is missing in [start, start + bytes) fails to be read in the child; what it was forked without is passed over.
  // False when it cannot be done: this kernel cannot poison (before Linux 6.6), or has no memory for it. `page`: what is
  // made to fail at a time.
  [[nodiscard]] bool poison(OwnerAddress start, std::uint64_t bytes, std::uint64_t page);
  // The page that an address is in.
  struct Around {
    OwnerAddress start;
    std::uint64_t bytes = 0;
    bool missing = false;
  };
  // Reads what the child has raised. What it waits for fails where it is missing; else it has discarded that, and gets
  // zeros, or what its file has of a huge page. Gives the copies of its own children.
  std::vector<UniqueFd> serve(const std::function<Around(OwnerAddress)>& around);
  // Whether the child has ended, or runs another program; `at` is any page of the memory.
  [[nodiscard]] bool ended(OwnerAddress at);
  [[nodiscard]] int fd() const { return uffd_.fd(); }

 private:
  bool read_some();

  Userfaultfd uffd_;
  std::vector<OwnerAddress> faults_;
  std::vector<UniqueFd> children_;
};

}  // namespace memferry
