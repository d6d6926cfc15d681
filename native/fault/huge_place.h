// Where the huge pages of a region are put together, and how a whole one gets from there into the mapping that is paged:
//
//   shared memory of this process   a second mapping of its file, the *alias*, which nobody else has; UFFDIO_CONTINUE
//   of another process              the region's view is such a mapping, the owner's is the one that is paged
//   private memory                  staging memory of ordinary pages, let go of as it is copied; UFFDIO_COPY
//
// Threads: any, after open(). Who calls sees to it that nobody writes a huge page while it is given or taken back.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "fault/arrival_map.h"
#include "os/userfaultfd.h"

namespace memferry {

class HugePlace {
 public:
  // `map` outlives it. `shared` is how memory of this process is mapped.
  static std::unique_ptr<HugePlace> of(const ArrivalMap& map, std::uint64_t unit_bytes, bool shared);
  virtual ~HugePlace() = default;
  HugePlace(const HugePlace&) = delete;
  HugePlace& operator=(const HugePlace&) = delete;

  [[nodiscard]] virtual RegisterMode mode() const { return RegisterMode::kMissingAndMinor; }
  // Over the region as it is now. Throws SystemError.
  virtual void open() = 0;
  // Makes sure of the memory for what is not there yet, where nobody has. Throws SystemError: ENOMEM, there are too few.
  virtual void reserve() {}
  [[nodiscard]] virtual std::byte* at(PageNumber page) const = 0;
  // Puts memory behind the huge page that begins at `first`: a write that finds none is killed, this gives false. Asked
  // anew each time: the guest may have discarded it since.
  [[nodiscard]] virtual bool populate(PageNumber first) const;
  // Into the region's mapping, and who waits there is woken. kAgain with EFAULT: nothing is here, populate it.
  virtual PageResult give(Userfaultfd& uffd, PageNumber first) const;
  // Whole ones out of the region's mapping, with what is there. The first that could not be kept, for want of memory; what
  // follows it stays. Throws SystemError, OwnerGone.
  virtual std::optional<PageNumber> take_back(PageRun run) const = 0;
  // What it takes beside the region's own memory.
  [[nodiscard]] virtual std::uint64_t extra_bytes() const { return 0; }

 protected:
  HugePlace(const ArrivalMap& map, std::uint64_t unit_bytes) : map_(map), unit_bytes_(unit_bytes) {}
  // Those of `run` that are in the page table of whoever owns the memory.
  [[nodiscard]] std::vector<PageNumber> mapped(PageRun run) const;

  const ArrivalMap& map_;
  const std::uint64_t unit_bytes_;
};

}  // namespace memferry
