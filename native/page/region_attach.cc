// Regions of memory that another process owns.
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <string>
#include <utility>

#include "os/process_maps.h"
#include "page/region.h"

namespace memferry {
namespace {

constexpr std::size_t kMostMappings = 4096;

std::string hex(std::uint64_t value) {
  static constexpr const char* kDigits = "0123456789abcdef";
  std::string text;
  for (int shift = 60; shift >= 0; shift -= 4) {
    if (text.empty() && shift > 0 && (value >> static_cast<unsigned>(shift)) == 0) continue;
    text += kDigits[(value >> static_cast<unsigned>(shift)) & 15U];
  }
  return "0x" + text;
}

// Gives the size of its huge pages, 0 for none.
std::uint64_t check_memory(int memory, const std::vector<Extent>& extents,
                           const std::vector<std::uint64_t>& offsets, std::uint64_t page_size) {
  struct stat status {};
  if (::fstat(memory, &status) != 0) throw_errno("fstat(memory)");
  if (!S_ISREG(status.st_mode)) throw std::invalid_argument("the memory is no file that can be mapped");
  struct statfs system {};
  if (::fstatfs(memory, &system) != 0) throw_errno("fstatfs(memory)");
  const bool huge = system.f_type == HUGETLBFS_MAGIC;
  if (!huge && system.f_type != TMPFS_MAGIC) {
    throw std::invalid_argument(
        "the memory is a file on a disk: only tmpfs (memfd, /dev/shm) and hugetlbfs can be paged");
  }
  const std::uint64_t huge_bytes = huge ? static_cast<std::uint64_t>(system.f_bsize) : 0;
  const auto size = static_cast<std::uint64_t>(status.st_size);
  for (std::size_t i = 0; i < extents.size(); ++i) {
    if (offsets[i] % page_size != 0)
      throw std::invalid_argument("a mapping's offset is not at a page boundary");
    if (huge && (extents[i].start.value | extents[i].bytes | offsets[i]) % huge_bytes != 0)
      throw std::invalid_argument(
          "a mapping of huge pages does not begin and end at one, here and in its file");
    if (offsets[i] > size || extents[i].bytes > size - offsets[i])
      throw std::invalid_argument("a mapping reaches beyond the end of the memory's file");
  }
  std::vector<std::pair<std::uint64_t, std::uint64_t>> parts;
  for (std::size_t i = 0; i < extents.size(); ++i) parts.emplace_back(offsets[i], extents[i].bytes);
  std::sort(parts.begin(), parts.end());
  for (std::size_t i = 1; i < parts.size(); ++i) {
    if (parts[i - 1].first + parts[i - 1].second > parts[i].first)
      throw std::invalid_argument("two mappings have the same part of the memory's file");
  }
  return huge_bytes;
}

}  // namespace

std::shared_ptr<Region> Region::attach(Attachment attachment) {
  if (!attachment.owner) throw std::invalid_argument("attached memory has an owner");
  if (attachment.extents.size() > kMostMappings) throw std::invalid_argument("too many mappings");
  if (attachment.memory) {
    if (attachment.offsets.size() != attachment.extents.size())
      throw std::invalid_argument("each mapping of a file has its offset there");
  }
  for (const Extent& extent : attachment.extents) {
    if (extent.bytes == 0) throw std::invalid_argument("a mapping is empty");
  }
  return std::shared_ptr<Region>(new Region(std::move(attachment)));
}

void Region::check_attached(const char* operation) const {
  if (!owner_) return;
  struct stat file {};
  if (memory_ && ::fstat(memory_.get(), &file) != 0) throw_errno("fstat(memory)");
  std::vector<std::uint64_t> reached;
  for (const Extent& extent : extents_) reached.push_back(extent.start.value);
  std::string wrong;
  for_each_mapped_area(
      [&](const MappedArea& area) {
        for (std::size_t i = 0; i < extents_.size(); ++i) {
          const std::uint64_t end = extents_[i].start.value + extents_[i].bytes;
          if (area.end.value <= reached[i] || area.start.value > reached[i] || reached[i] >= end) continue;
          const bool ours = !memory_
                                ? !area.file && !area.shared
                                : area.shared && area.inode == file.st_ino && area.device == file.st_dev &&
                                      area.offset + (reached[i] - area.start.value) ==
                                          offsets_[i] + (reached[i] - extents_[i].start.value);
          if (!ours && wrong.empty()) {
            const bool private_huge = !memory_ && !area.shared && area.name.starts_with("/anon_hugepage");
            wrong = hex(reached[i]) + (memory_ ? " is not the given file's memory at its offset"
                                       : private_huge
                                           ? " is of huge pages that are mapped privately: only "
                                             "shared ones (a memfd, a file in hugetlbfs) can be attached"
                                           : " is shared or a file's: its memory must be given");
          }
          reached[i] = std::min(area.end.value, end);
        }
        return true;
      },
      owner_.get());
  for (std::size_t i = 0; i < extents_.size() && wrong.empty(); ++i) {
    if (reached[i] != extents_[i].start.value + extents_[i].bytes) wrong = hex(reached[i]) + " is not mapped";
  }
  if (!wrong.empty())
    throw SystemError(std::string(operation) + ": in process " + std::to_string(owner_->pid()) + " " + wrong,
                      EFAULT);
}

void Region::stage() {
  const std::lock_guard lock(stage_mutex_);
  if (viewed_.load(std::memory_order_acquire)) return;
  views_.push_back(Mapping::anonymous(capacity_pages_ * page_size_));
  viewed_.store(true, std::memory_order_release);
}

void Region::read_file(PageRun run, std::span<std::byte> into) const {
  const std::size_t index = extent_of(run.first);
  const std::uint64_t at = offsets_[index] + (run.first.value - first_page_[index]) * page_size_;
  for (std::size_t done = 0; done < into.size();) {
    const ssize_t got =
        ::pread(memory_.get(), into.data() + done, into.size() - done, static_cast<off_t>(at + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw_errno("pread(memory)");
    if (got == 0) throw SystemError("the memory's file has become shorter", EFAULT);
    done += static_cast<std::size_t>(got);
  }
}

bool Region::file_content(PageRun run, const std::function<void(PageRun)>& found) const {
  if (!memory_ || !has_holes_) return false;
  while (run.count > 0) {
    const PageRun part = contiguous_run(run);
    const std::size_t index = extent_of(part.first);
    const std::uint64_t base = offsets_[index] - first_page_[index] * page_size_;  // of page 0, wrapping
    const std::uint64_t end = base + part.end().value * page_size_;
    for (std::uint64_t at = base + part.first.value * page_size_; at < end;) {
      const off_t data = ::lseek(memory_.get(), static_cast<off_t>(at), SEEK_DATA);
      if (data < 0 && errno == ENXIO) break;
      const off_t hole = data < 0 ? -1 : ::lseek(memory_.get(), data, SEEK_HOLE);
      // Whatever it is: then all of the rest may have content. (ENXIO: the data went away in between.)
      const bool unknown = data < 0 || (hole < 0 && errno != ENXIO);
      const std::uint64_t from = unknown ? at : static_cast<std::uint64_t>(data) / page_size_ * page_size_;
      const std::uint64_t to =
          unknown || hole < 0 ? end
                              : (static_cast<std::uint64_t>(hole) + page_size_ - 1) / page_size_ * page_size_;
      const std::uint64_t first = std::max(from, at);
      const std::uint64_t last = std::min(to, end);
      if (first < last) found({PageNumber{(first - base) / page_size_}, (last - first) / page_size_});
      at = std::max(to, at + page_size_);
    }
    run = {part.end(), run.count - part.count};
  }
  return true;
}

std::string gone_owner(std::span<const std::shared_ptr<Region>> regions) {
  for (const auto& region : regions) {
    if (region->owner() && !region->owner()->alive())
      return region->owner()->gone("the migration ends").what();
  }
  return {};
}

Region::Region(Attachment attachment)
    : page_size_(system_page_size()),
      owned_(false),
      owner_(std::move(attachment.owner)),
      uffd_(std::move(attachment.uffd)),
      memory_(std::move(attachment.memory)),
      viewed_(static_cast<bool>(memory_)) {
  check_extents(attachment.extents, attachment.extents.empty() ? 0 : attachment.extents.back().bytes,
                page_size_);
  if (memory_) {
    huge_page_bytes_ = check_memory(memory_.get(), attachment.extents, attachment.offsets, page_size_);
    // A file position of our own: SEEK_DATA moves it, and a duplicate would share that of whoever gave it.
    UniqueFd own(::open(("/proc/self/fd/" + std::to_string(memory_.get())).c_str(), O_RDWR | O_CLOEXEC));
    if (!own) throw_errno("open(memory)");
    memory_ = std::move(own);
    // hugetlbfs answers too, and takes everything for data.
    has_holes_ = huge_page_bytes_ == 0 && (::lseek(memory_.get(), 0, SEEK_DATA) >= 0 || errno == ENXIO);
    const int seals = ::fcntl(memory_.get(), F_GET_SEALS);
    may_shrink_ = huge_page_bytes_ != 0 || seals < 0 || (seals & F_SEAL_SHRINK) == 0;
  }
  extents_ = std::move(attachment.extents);
  offsets_ = std::move(attachment.offsets);
  std::uint64_t pages = 0;
  for (std::size_t i = 0; i < extents_.size(); ++i) {
    first_page_.push_back(pages);
    pages += extents_[i].bytes / page_size_;
    // What the owner has not reserved of huge pages is not reserved here either.
    if (memory_) {
      views_.push_back(Mapping::shared(memory_.get(), extents_[i].bytes, offsets_[i], PROT_READ | PROT_WRITE,
                                       huge_page_bytes_ != 0 ? MAP_NORESERVE : 0));
    }
  }
  pages_.store(pages, std::memory_order_release);
  capacity_pages_ = pages;
  check_attached("attach");
  if (uffd_ && (uffd_->enabled() & UFFD_FEATURE_EVENT_REMOVE) != 0) {
    removed_ = std::make_unique<AtomicBitmap>(pages);
    removed_before_ = std::make_unique<AtomicBitmap>(pages);
  }
  join_turn();
}

}  // namespace memferry
