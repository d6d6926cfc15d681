// A region: memory that can move. Page-aligned extents of one process, this one or another, one page size, numbered as
// one sequence of pages.
//
// Two kinds of addresses: the *owner's* (extents(), owner_address(), page_at()), which trackers and pagers name to the
// kernel, and the *view* (contiguous(), address()), where the bytes are read and written in this process. They are the
// same where this process owns the memory. A shared file that another process has mapped is mapped here once more.
// Private memory of another process has no view: it is read by RegionReader, and a receiver may give it a waiting room
// (stage()), where pages wait until the pager installs them.
//
// Whoever owns the memory (our own mapping, or V8 through a pinned JavaScript object)
// calls retire() before it goes away; retire() stops every native user first, so that no native thread
// ever touches memory that has been unmapped.
//
// Threads: every method may be called from any thread.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "os/mapping.h"
#include "os/process.h"
#include "os/sys_error.h"
#include "os/userfaultfd.h"
#include "page/bitmap.h"
#include "page/range.h"

namespace memferry {

struct Extent {
  OwnerAddress start;
  std::uint64_t bytes = 0;  // a multiple of the page size
};

// The region has been retired: its memory may be gone.
class RegionGone : public SystemError {
 public:
  explicit RegionGone(const std::string& operation)
      : SystemError(operation + ": the region is gone", EFAULT) {}
};

class Region : public std::enable_shared_from_this<Region> {
 public:
  // Anonymous private memory of our own, unmapped when the last reference goes. `bytes` is a multiple of
  // the page size (else std::invalid_argument). Throws SystemError (mmap).
  static std::shared_ptr<Region> allocate(std::uint64_t bytes);

  // The same of reserved huge pages, shared so that it can be paged into (fault/huge_memory.h); nobody else has its file.
  // `bytes` is a multiple of kHugePageBytes (else std::invalid_argument). Throws SystemError: ENOMEM when not so many are
  // free.
  static constexpr std::uint64_t kHugePageBytes = 2UL << 20;
  static std::shared_ptr<Region> allocate_huge(std::uint64_t bytes);

  // Memory owned by somebody else. `extents` must be page-aligned, not empty, and must not overlap (else
  // std::invalid_argument). `capacity_bytes` is how far the LAST extent may grow in place, counted from its
  // own start (>= its bytes): a WebAssembly memory. `page_size`: 0 for the system's, else a multiple of it that is a power
  // of two, by which extents and capacity are aligned: for huge pages that are tracked as a whole.
  static std::shared_ptr<Region> adopt(const std::vector<Extent>& extents, std::uint64_t capacity_bytes,
                                       std::uint64_t page_size = 0);

  // Memory of another process. Throws std::invalid_argument; SystemError: EFAULT when part of it is not mapped there,
  // or not as it is said; OwnerGone.
  struct Attachment {
    std::shared_ptr<Process> owner;
    std::vector<Extent> extents;         // the owner's addresses; all of it mapped readable and writable
    std::optional<Userfaultfd> uffd;     // made by the owner for its memory: to track by it, to page by it
    UniqueFd memory;                     // the file that is mapped there, shared; none: private memory
    std::vector<std::uint64_t> offsets;  // of each extent in that file
  };
  static std::shared_ptr<Region> attach(Attachment attachment);

  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  [[nodiscard]] std::uint64_t page_size() const { return page_size_; }
  [[nodiscard]] std::uint64_t pages() const { return pages_.load(std::memory_order_acquire); }
  [[nodiscard]] std::uint64_t capacity_pages() const { return capacity_pages_; }
  [[nodiscard]] std::uint64_t bytes() const { return pages() * page_size_; }

  // The region now has `pages` pages (never fewer than before, never above the capacity; else
  // std::invalid_argument). Its memory is already there: V8 has grown it in place.
  void grow(std::uint64_t pages);

  // nullptr when this process owns the memory.
  [[nodiscard]] const std::shared_ptr<Process>& owner() const { return owner_; }
  // Of attached memory, nullptr where it has none.
  [[nodiscard]] const Userfaultfd* uffd() const { return uffd_ ? &*uffd_ : nullptr; }
  [[nodiscard]] Userfaultfd* uffd() { return uffd_ ? &*uffd_ : nullptr; }
  // Shared memory that is written by this region's addresses alone: its file is the region's own.
  [[nodiscard]] bool sole_mapping() const { return owned_ && memory_; }
  // Attached, and without a file that could be mapped here.
  [[nodiscard]] bool remote() const { return owner_ && !memory_; }
  // Gives remote memory a waiting room as its view, zeros; twice is fine. Throws SystemError.
  void stage();
  // Where the memory is a file with holes: visits the runs of pages of `run` that are none, in order. False, and no visit,
  // when there is no such file.
  bool file_content(PageRun run, const std::function<void(PageRun)>& found) const;
  // Its file may become shorter, so that a look at the view may end in SIGBUS: read_file() does not. True of huge pages
  // too: a look at one that is not there would take one.
  [[nodiscard]] bool may_shrink() const { return may_shrink_; }
  // Of attached shared memory of reserved huge pages, which it begins and ends at: so large; else 0.
  [[nodiscard]] std::uint64_t huge_page_bytes() const { return huge_page_bytes_; }
  // Copies run.count pages, contiguous ones, from its file. Throws SystemError (EFAULT: the file has become shorter).
  void read_file(PageRun run, std::span<std::byte> into) const;
  // Who reads the events of its userfaultfd: one at a time. False when somebody does. No other process of memferry's has a
  // region with it: attach() refuses that (EBUSY).
  [[nodiscard]] bool begin_events();
  // kSome: the events wait for the next pager, whose process may be another one. kUnknown: whoever drains looks.
  enum class Missing { kUnknown, kNone, kSome };
  void end_events(Missing missing);
  // Reads what is there, so that the owner's system calls go on. What it has discarded is kept for take_removed(), of
  // every region that has the same userfaultfd. False when somebody here reads them, for any of those regions; when pages
  // are missing for which a pager has been asked: what is discarded then is that pager's to know, for good; or when
  // somebody elsewhere seems to read: there were faults, which are raised again, and should be left alone for a while.
  bool drain_events();
  // ORs the pages that the owner has discarded since the last call, and those of the call before once more: the event is
  // read before the pages go.
  void take_removed(AtomicBitmap& into);
  // What is not there while a userfaultfd, whoever has it, is asked for it would be taken for zeros: throws SystemError
  // (EBUSY) with the pages. Gives whether one is asked at all. Attached memory only; some milliseconds a GiB.
  bool check_not_missing(const char* operation) const;
  // Whether that would throw.
  [[nodiscard]] bool awaits_pages() const;
  // Of an attached file what was lost, and fails to be read at the owner's, is a hole in the file, zeros for who reads that:
  // throws SystemError (EIO) with the pages.
  void check_not_lost(const char* operation) const;
  // Of attached memory: the pages that are there, zeros that were only read included.
  [[nodiscard]] std::vector<PageRun> pages_there() const;
  // Of an attached file in which nothing is there: drops what is reserved for it, which looks missing and reads as zeros.
  void drop_reserved();
  // Whether all of it is still mapped at the owner's as it was when it was attached. Throws SystemError (EFAULT).
  void check_attached(const char* operation) const;

  // Extents as they are now, in the owner's addresses.
  [[nodiscard]] std::vector<Extent> extents() const;
  // The same with the last one as long as it may become.
  [[nodiscard]] std::vector<Extent> capacity_extents() const;

  // Where a page is, here and at its owner's; `page` < pages(), else std::out_of_range.
  [[nodiscard]] Address address(PageNumber page) const;
  [[nodiscard]] OwnerAddress owner_address(PageNumber page) const;
  // The pages of `run` that are contiguous in memory (in the view and at the owner's), from its first on. The run's
  // first page must be inside the region, else std::out_of_range; the result never leaves it.
  [[nodiscard]] PageRun contiguous_run(PageRun run) const;
  // The same as the bytes of the view; std::logic_error when there is none.
  [[nodiscard]] std::span<std::byte> contiguous(PageRun run) const;
  // The runs of pages, up to its pages now, that lie in [start, end) of the owner's addresses, in part or whole.
  void for_each_run_between(OwnerAddress start, OwnerAddress end,
                            const std::function<void(PageRun)>& visit) const;
  // The page that holds `address`, if the region does (up to its capacity).
  [[nodiscard]] std::optional<PageNumber> page_at(OwnerAddress address) const;

  // Native code that touches the memory registers `stop` and keeps the returned token while it may touch.
  // `stop` is called at most once, by retire(), from retire()'s thread, and must return only when the user's
  // threads touch the region no more; the token may live on after that. enlist() gives nullptr when the
  // region is retired already.
  //
  // Dropping the token waits for a `stop` that is running on another thread, so that `stop` never runs on
  // what its owner has destroyed: a thread that `stop` joins must not be the one to drop the token.
  class User {
   public:
    ~User();
    User(const User&) = delete;
    User& operator=(const User&) = delete;

   private:
    friend class Region;
    User(std::shared_ptr<Region> region, std::uint64_t key) : region_(std::move(region)), key_(key) {}
    std::shared_ptr<Region> region_;
    std::uint64_t key_;
  };
  [[nodiscard]] std::unique_ptr<User> enlist(std::function<void()> stop);
  // Refuses new users, calls every stop (with no lock held) and returns when all of them have returned. May
  // be called twice, also at once; each call returns when no user is left.
  void retire();
  [[nodiscard]] bool retired() const { return retired_.load(std::memory_order_acquire); }

  // One migration at a time: true when the claim was free. release() gives it back. Waits for a glance that is under
  // way: some ten microseconds of its thread's.
  [[nodiscard]] bool claim();
  void release() { claimed_.store(false); }

  // For those who read it in the background, a few pages at a time (a sampler): they look away while the region is on
  // its way, so that they neither take anything from a migration nor ever touch a page that is missing here. False: it
  // is on its way; nothing may be touched. Otherwise end_glance() must follow, soon.
  [[nodiscard]] bool begin_glance();
  void end_glance();
  // Between the two nobody glances: the memory is being made by somebody else.
  void begin_arrival();
  void end_arrival() { arrivals_.fetch_sub(1); }

 private:
  Region(const std::vector<Extent>& extents, std::uint64_t capacity_bytes, bool owned,
         std::uint64_t page_size);
  explicit Region(Attachment attachment);
  static void check_extents(const std::vector<Extent>& extents, std::uint64_t capacity_bytes,
                            std::uint64_t page_size);
  [[nodiscard]] std::size_t extent_of(PageNumber page) const;
  [[nodiscard]] std::vector<Extent> extents_for(std::uint64_t pages) const;

  const std::uint64_t page_size_;
  const bool owned_;                       // unmapped by the destructor
  std::vector<Extent> extents_;            // as at first: the last one's length now follows from pages_
  std::vector<std::uint64_t> first_page_;  // of each extent
  // Of memory of another process.
  std::shared_ptr<Process> owner_;
  std::optional<Userfaultfd> uffd_;
  UniqueFd memory_;  // also of huge pages of our own
  bool may_shrink_ = false;
  std::uint64_t huge_page_bytes_ = 0;
  bool has_holes_ = false;              // SEEK_DATA says where its content is
  std::vector<std::uint64_t> offsets_;  // of each extent in memory_
  std::vector<Mapping> views_;          // of each extent, or one waiting room for all
  std::atomic<bool> viewed_{true};
  std::mutex stage_mutex_;  // guards the making of a waiting room
  struct EventTurn;         // shared by all regions here that have the same userfaultfd
  struct EventTurns;
  std::shared_ptr<EventTurn> turn_;  // nullptr: it has none; guards the four below
  bool events_taken_ = false;
  Missing missing_ = Missing::kUnknown;
  std::unique_ptr<AtomicBitmap> removed_;  // nullptr: its userfaultfd does not tell
  std::unique_ptr<AtomicBitmap> removed_before_;
  std::uint64_t capacity_pages_ = 0;
  std::atomic<std::uint64_t> pages_{0};
  std::atomic<bool> retired_{false};
  std::atomic<bool> claimed_{false};
  std::atomic<std::uint32_t> arrivals_{0};
  std::atomic<std::uint32_t> glances_{0};
  void await_glances();
  void join_turn();
  void leave_turn();
  void note_removed(OwnerAddress start, OwnerAddress end);
  // The runs of pages of `within` that are there, of attached memory.
  void visit_there(PageRun within, const std::function<void(PageRun)>& visit) const;
  void find_marks(AtomicBitmap& found_marks) const;

  struct Enlisted {
    std::uint64_t key = 0;
    std::function<void()> stop;
    bool stopped = false;         // stop has returned
    std::thread::id stopping_on;  // while stop runs
  };
  std::mutex users_mutex_;  // guards users_, next_key_ and the decision in enlist() against retire()
  std::condition_variable users_changed_;
  std::vector<Enlisted> users_;
  std::uint64_t next_key_ = 1;
};

// What has become of the owner of one of these, where it is another process that is gone; empty: none is.
[[nodiscard]] std::string gone_owner(std::span<const std::shared_ptr<Region>> regions);

// For one operation that touches the memory on the calling thread: retire() waits until it is over, and the
// operation looks at revoked() now and then, to be over soon.
class RegionUse {
 public:
  // Throws RegionGone.
  RegionUse(const std::shared_ptr<Region>& region, const char* operation);
  ~RegionUse();
  RegionUse(const RegionUse&) = delete;
  RegionUse& operator=(const RegionUse&) = delete;
  [[nodiscard]] bool revoked() const { return revoked_.load(std::memory_order_acquire); }

 private:
  std::atomic<bool> revoked_{false};
  std::mutex mutex_;  // guards over_
  std::condition_variable changed_;
  bool over_ = false;
  std::unique_ptr<Region::User> user_;
};

// Until it goes, the region's memory is being made here: nobody glances at it.
class RegionArrival {
 public:
  explicit RegionArrival(std::shared_ptr<Region> region) : region_(std::move(region)) {
    region_->begin_arrival();
  }
  ~RegionArrival() { region_->end_arrival(); }
  RegionArrival(const RegionArrival&) = delete;
  RegionArrival& operator=(const RegionArrival&) = delete;

 private:
  const std::shared_ptr<Region> region_;
};

}  // namespace memferry
