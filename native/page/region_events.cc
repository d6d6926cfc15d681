// Who reads the events of the userfaultfd of attached memory.
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <string>
#include <utility>

#include "os/process_maps.h"
#include "page/forked_copy.h"
#include "page/region.h"

namespace memferry {
namespace {

bool same_open_file(int one, int other) {
  constexpr int kFile = 0;  // KCMP_FILE
  const pid_t self = ::getpid();
  const long order = ::syscall(SYS_kcmp, self, self, kFile, one, other);
  if (order >= 0) return order == 0;
  // Each userfaultfd has an inode of its own (Linux 5.12). Before, all count as one: nothing is read twice.
  struct stat first {};
  struct stat second {};
  return ::fstat(one, &first) == 0 && ::fstat(other, &second) == 0 && first.st_dev == second.st_dev &&
         first.st_ino == second.st_ino;
}

// One process of memferry's at a time has this userfaultfd of the owner's attached: its part of a file that all of them
// can open is locked, for as long as the descriptor lives, which a process's end ends as well.
UniqueFd claim_events(const Process& owner, int uffd) {
  struct stat status {};
  if (::fstat(uffd, &status) != 0) throw_errno("fstat(userfaultfd)");
  UniqueFd file = owner.open_file("mem", O_RDWR);
  struct flock part {};
  part.l_type = F_WRLCK;
  part.l_whence = SEEK_SET;
  part.l_start = static_cast<off_t>(status.st_ino & 0x7fffffffU);  // each has one of its own (Linux 5.12)
  part.l_len = 1;
  if (::fcntl(file.get(), F_OFD_SETLK, &part) == 0) return file;
  if (errno != EAGAIN && errno != EACCES) throw_errno("fcntl(F_OFD_SETLK)");
  throw SystemError("attach: another process has the userfaultfd of process " + std::to_string(owner.pid()) +
                        " attached: each of its events goes to one reader only",
                    EBUSY);
}

// A child's userfaultfd is about to be closed: what somebody pages at its parent must not become zeros there. False when
// it may.
bool poison_missing_of(const UniqueFd& child, const Process* owner) {
  try {
    bool done = true;
    for_each_paged_area(
        [&](OwnerAddress start, OwnerAddress end) {
          done = ForkedCopy(child).poison(start, end.value - start.value, system_page_size()) && done;
        },
        owner);
    return done;
  } catch (const SystemError&) {
    return false;
  }
}

bool overlap(const Region& one, const Region& other) {
  for (const Extent& first : one.capacity_extents()) {
    for (const Extent& second : other.capacity_extents()) {
      if (first.start < second.start.plus(second.bytes) && second.start < first.start.plus(first.bytes))
        return true;
    }
  }
  return false;
}

}  // namespace

// Several regions may have one userfaultfd, each by a descriptor of its own. What one of them reads concerns all.
struct Region::EventTurn {
  const pid_t process = ::getpid();  // a fork() of it is another reader
  std::mutex mutex;                  // guards all below, and what the members say that it does
  std::vector<Region*> members;
  std::uint32_t taken = 0;           // members whose events somebody reads
  std::vector<UniqueFd> kept_apart;  // of children that must not read zeros
  UniqueFd claim;                    // of the owner's /proc/PID/mem, locked against other processes
};

// All turns of this process: whether two descriptors are one userfaultfd cannot be asked of anything else.
struct Region::EventTurns {
  std::mutex mutex;  // guards the next; before a turn's own
  std::vector<std::weak_ptr<EventTurn>> known;
  static EventTurns& of_this_process() {
    static EventTurns turns;
    return turns;
  }
};

void Region::join_turn() {
  if (!uffd_) return;
  EventTurns& turns = EventTurns::of_this_process();
  const std::lock_guard lock(turns.mutex);
  std::erase_if(turns.known, [](const auto& entry) { return entry.expired(); });
  for (const auto& entry : turns.known) {
    const std::shared_ptr<EventTurn> turn = entry.lock();
    if (!turn || turn->process != ::getpid()) continue;
    const std::lock_guard members(turn->mutex);
    if (turn->members.empty() || !same_open_file(turn->members.front()->uffd_->fd(), uffd_->fd())) continue;
    turn->members.push_back(this);
    turn_ = turn;
    return;
  }
  auto turn = std::make_shared<EventTurn>();
  turn->claim = claim_events(*owner_, uffd_->fd());
  turn->members.push_back(this);
  turns.known.push_back(turn);
  turn_ = std::move(turn);
}

void Region::leave_turn() {
  if (!turn_) return;
  const std::lock_guard turns(EventTurns::of_this_process().mutex);
  const std::lock_guard lock(turn_->mutex);
  if (events_taken_) --turn_->taken;
  events_taken_ = false;
  std::erase(turn_->members, this);
  if (turn_->members.empty()) turn_->claim.reset();
}

// Two that have the same memory are two readers; one reader may have several memories.
bool Region::begin_events() {
  if (!turn_) return false;
  const std::lock_guard lock(turn_->mutex);
  if (std::find(turn_->members.begin(), turn_->members.end(), this) == turn_->members.end()) return false;
  for (const Region* other : turn_->members) {
    if (!other->events_taken_) continue;
    if (other == this) return false;
    if (overlap(*other, *this)) return false;
  }
  events_taken_ = true;
  ++turn_->taken;
  return true;
}

void Region::end_events(Missing missing) {
  if (!turn_) return;
  const std::lock_guard lock(turn_->mutex);
  if (events_taken_) --turn_->taken;
  events_taken_ = false;
  // It is the memory's, whichever of its regions has seen it.
  for (Region* member : turn_->members) {
    if (member == this || overlap(*member, *this)) member->missing_ = missing;
  }
}

void Region::note_removed(OwnerAddress start, OwnerAddress end) {
  if (removed_) for_each_run_between(start, end, [this](PageRun run) { removed_->set_run(run); });
}

bool Region::drain_events() {
  if (!turn_) return false;
  const std::lock_guard lock(turn_->mutex);
  if (turn_->taken != 0 || !turn_->claim) return false;
  for (Region* member : turn_->members) {
    if (member->missing_ == Missing::kUnknown)
      member->missing_ = member->awaits_pages() ? Missing::kSome : Missing::kNone;
    if (member->missing_ == Missing::kSome) return false;
  }
  std::array<uffd_msg, 16> events;
  bool faults = false;
  // A fault that is raised again comes with the next call.
  for (;;) {
    const std::size_t count = uffd_->read_events(events);
    for (std::size_t i = 0; i < count; ++i) {
      const uffd_msg& event = events[i];
      if (event.event == UFFD_EVENT_REMOVE) {
        for (Region* member : turn_->members)
          member->note_removed(OwnerAddress{event.arg.remove.start}, OwnerAddress{event.arg.remove.end});
      } else if (event.event == UFFD_EVENT_FORK) {
        UniqueFd child(static_cast<int>(event.arg.fork.ufd));
        if (!poison_missing_of(child, owner_.get())) turn_->kept_apart.push_back(std::move(child));
      } else if (event.event == UFFD_EVENT_PAGEFAULT) {
        faults = true;
        const std::uint64_t page = event.arg.pagefault.address / page_size_ * page_size_;
        uffd_->wake(OwnerAddress{page}, page_size_);
      }
    }
    if (faults) return false;
    if (count == 0) return true;
  }
}

void Region::take_removed(AtomicBitmap& into) {
  if (!removed_) return;
  const std::lock_guard lock(turn_->mutex);
  for (std::uint64_t word = 0; word < removed_->words(); ++word) {
    into.or_word(word, removed_->word(word) | removed_before_->word(word));
  }
  std::swap(removed_, removed_before_);
  removed_->clear_run({PageNumber{0}, removed_->capacity()});
}

}  // namespace memferry
