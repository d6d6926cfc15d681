#include "page/forked_copy.h"

#include <sched.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <thread>
#include <utility>

#include "os/mapping.h"
#include "os/sys_error.h"

namespace memferry {
namespace {

constexpr int kTries = 2048;  // its layout is changing, or memory is short: about a second
constexpr int kSpinningTries = 64;
constexpr std::chrono::microseconds kBetweenTries{500};

}  // namespace

// False when there was nothing.
bool ForkedCopy::read_some() {
  std::array<uffd_msg, 16> events;
  const std::size_t count = uffd_.read_events(events);
  for (std::size_t i = 0; i < count; ++i) {
    if (events[i].event == UFFD_EVENT_FORK) children_.emplace_back(static_cast<int>(events[i].arg.fork.ufd));
    if (events[i].event == UFFD_EVENT_PAGEFAULT)
      faults_.push_back(OwnerAddress{events[i].arg.pagefault.address});
  }
  return count > 0;
}

bool ForkedCopy::poison(OwnerAddress start, std::uint64_t bytes, std::uint64_t page) {
  if ((uffd_.features() & abi::kUffdFeaturePoison) == 0) return false;
  int tries = 0;
  for (std::uint64_t most = bytes; bytes > 0;) {
    const std::uint64_t length = std::min(most, bytes);
    PageResult result;
    try {
      result = uffd_.poison(start, length, true);
    } catch (const SystemError&) {
      return false;
    }
    std::uint64_t done = result.bytes_done;
    if (result.outcome == PageOutcome::kExists) {
      done += page;
    } else if (result.outcome == PageOutcome::kGone) {
      if (result.error == ESRCH) return true;
      // Over the border of two mappings the kernel does nothing at all.
      if (length - done > page) {
        most = (length - done) / page / 2 * page;
      } else {
        done += page;
      }
    } else if (result.outcome != PageOutcome::kOk) {
      if (++tries > kTries) return false;
      // What is in the way may be what the child waits for.
      if (!read_some()) {
        if (tries < kSpinningTries)
          ::sched_yield();
        else
          std::this_thread::sleep_for(kBetweenTries);
      }
    }
    if (result.outcome == PageOutcome::kOk) most = most > bytes / 2 ? bytes : most * 2;
    start = start.plus(done);
    bytes -= done;
  }
  return true;
}

std::vector<UniqueFd> ForkedCopy::serve(const std::function<Around(OwnerAddress)>& around) {
  do {
    while (read_some()) {
    }
    for (const OwnerAddress at : std::exchange(faults_, {})) {
      const auto [start, page, missing] = around(at);
      if (missing) {
        (void)poison(start, page, page);
        continue;
      }
      if (page != system_page_size()) {
        (void)uffd_.unregister(start, page);
        continue;
      }
      // kAgain: the fault is raised again, behind the event that is in the way.
      if (uffd_.zeropage(start, page, true).outcome != PageOutcome::kOk) uffd_.wake(start, page);
    }
    // Poisoning reads what is in its way.
  } while (!faults_.empty());
  return std::exchange(children_, {});
}

// Nothing is changed by it: pages that nobody tracks there are not protected either.
bool ForkedCopy::ended(OwnerAddress at) {
  try {
    return uffd_.write_protect(at, system_page_size(), false, false).error == ESRCH;
  } catch (const SystemError&) {
    return false;
  }
}

}  // namespace memferry
