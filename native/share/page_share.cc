#include "share/page_share.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cmath>

#include "os/mapping.h"
#include "os/sys_error.h"
#include "share/share_file.h"

namespace memferry {

using share::ShareEntry;

PageShare::Result PageShare::open(const std::string& path, const ContentKey& key,
                                  std::uint64_t budget_bytes) {
  // Not a symbolic link that somebody else has put there; not a pipe that would be waited for.
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600));
  if (!fd) {
    if (errno == ELOOP || errno == EISDIR || errno == ENXIO) return {Opened::kForeign, nullptr};
    throw_errno("open(page share)");
  }
  struct stat status {};
  if (::fstat(fd.get(), &status) != 0) throw_errno("fstat(page share)");
  if (!S_ISREG(status.st_mode) || status.st_uid != ::geteuid()) return {Opened::kForeign, nullptr};
  if (::flock(fd.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno == EWOULDBLOCK) return {Opened::kBusy, nullptr};
    throw_errno("flock(page share)");
  }
  std::unique_ptr<PageShare> opened(new PageShare(std::move(fd), key, system_page_size()));
  const int file = opened->fd_.get();
  const share::Found found = share::header_of(file, opened->hasher_, system_page_size());
  if (found == share::Found::kNothing && status.st_size > 0) return {Opened::kForeign, nullptr};
  if (found != share::Found::kOurs) {
    if (::ftruncate(file, 0) != 0) throw_errno("ftruncate(page share)");
    share::ShareHeader header{};
    header.magic = share::kMagic;
    header.version = share::kVersion;
    header.page_size = static_cast<std::uint32_t>(system_page_size());
    header.check = share::check_of(opened->hasher_);
    if (::pwrite(file, &header, sizeof header, 0) != static_cast<ssize_t>(sizeof header))
      throw_errno("pwrite(page share)");
  }
  // Others' eyes are kept out of what is there already, too.
  if ((status.st_mode & 077) != 0 && ::fchmod(file, 0600) != 0) throw_errno("fchmod(page share)");
  const std::lock_guard lock(opened->mutex_);
  opened->budget_ = budget_bytes;
  // Throws where the file system cannot give memory back.
  opened->punch(opened->layout_.page_offset(share::ShareLayout::kMostSlots), system_page_size());
  opened->take_over();
  opened->shrink_to_budget();
  return {Opened::kOpened, std::move(opened)};
}

PageShare::PageShare(UniqueFd fd, const ContentKey& key, std::uint64_t page_size)
    : fd_(std::move(fd)), hasher_(key), layout_(page_size), scratch_(page_size) {}

PageShare::~PageShare() = default;

void PageShare::take_over() {
  const std::uint64_t bytes = share::length_of(fd_.get()).value_or(0);
  const std::uint64_t groups = layout_.groups_in(bytes);
  std::vector<ShareEntry> entries;
  for (std::uint64_t group = 0; group < groups; ++group) {
    const auto read = share::read_index(fd_.get(), layout_, group, entries);
    if (!take_over_group(group, read))
      punch(layout_.index_offset(group), (1 + layout_.group_slots()) * page_size());
  }
  // Ages say what was here before.
  taken_over_ = slots_.next_age();
  counts_.unverified = slots_.size();
  const std::uint64_t end = layout_.index_offset(group_used_.size());
  if (bytes > end && ::ftruncate(fd_.get(), static_cast<off_t>(end)) != 0)
    throw_errno("ftruncate(page share)");
}

// False where the group has nothing that can be used.
bool PageShare::take_over_group(std::uint64_t group, std::span<const ShareEntry> entries) {
  bool any = false;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const ShareEntry& entry = entries[i];
    if (entry.used != 1 || !std::isfinite(entry.score) || slots_.find(entry.digest)) continue;
    use(static_cast<std::uint32_t>(group * layout_.group_slots() + i), entry.digest, entry.score);
    any = true;
  }
  if (!any) return false;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const auto slot = static_cast<std::uint32_t>(group * layout_.group_slots() + i);
    if (slots_.in_use(slot)) continue;
    if (entries[i].used != 0) write_entry(slot, {});
    punch(layout_.page_offset(slot), page_size());
  }
  return true;
}

std::uint64_t PageShare::bytes_used() const {
  return (1 + group_used_.size() - empty_.size() + slots_.size()) * page_size();
}

std::uint64_t PageShare::bytes_with_one_more() const {
  return bytes_used() + (partial_.empty() ? 2 : 1) * page_size();
}

std::uint32_t PageShare::free_slot() {
  const auto group_slots = static_cast<std::uint32_t>(layout_.group_slots());
  std::uint32_t group = static_cast<std::uint32_t>(group_used_.size());
  if (!partial_.empty()) {
    group = *partial_.begin();
  } else if (!empty_.empty()) {
    group = *empty_.begin();
  }
  std::uint32_t slot = group * group_slots;
  while (slots_.in_use(slot)) ++slot;
  return slot;
}

void PageShare::use(std::uint32_t slot, const ContentDigest& digest, double score) {
  slots_.add(slot, digest, score);
  const auto group = static_cast<std::uint32_t>(layout_.group_of(slot));
  while (group_used_.size() <= group) {
    empty_.insert(static_cast<std::uint32_t>(group_used_.size()));
    group_used_.push_back(0);
  }
  const std::uint32_t used = ++group_used_[group];
  if (used == 1) empty_.erase(group);
  if (used == layout_.group_slots()) {
    partial_.erase(group);
  } else if (used == 1) {
    partial_.insert(group);
  }
}

// The entry first: then whoever finds it has a page to try.
void PageShare::drop(std::uint32_t slot) {
  if (unverified(slot)) --counts_.unverified;
  const auto group = static_cast<std::uint32_t>(layout_.group_of(slot));
  slots_.remove(slot);
  const std::uint32_t used = --group_used_[group];
  if (used + 1 == layout_.group_slots()) partial_.insert(group);
  if (used > 0) {
    write_entry(slot, {});
    punch(layout_.page_offset(slot), page_size());
    return;
  }
  partial_.erase(group);
  empty_.insert(group);
  if (group + 1 < group_used_.size()) {
    punch(layout_.index_offset(group), page_size());
    punch(layout_.page_offset(slot), page_size());
    return;
  }
  while (!group_used_.empty() && group_used_.back() == 0) {
    group_used_.pop_back();
    empty_.erase(static_cast<std::uint32_t>(group_used_.size()));
  }
  if (::ftruncate(fd_.get(), static_cast<off_t>(layout_.index_offset(group_used_.size()))) != 0)
    throw_errno("ftruncate(page share)");
}

void PageShare::shrink_to_budget() {
  while (slots_.size() > 0 && bytes_used() > budget_) {
    drop(slots_.least());
    ++counts_.evicted;
  }
}

void PageShare::punch(std::uint64_t offset, std::uint64_t bytes) {
  if (::fallocate(fd_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                  static_cast<off_t>(bytes)) != 0) {
    throw_errno("fallocate(FALLOC_FL_PUNCH_HOLE)");
  }
}

// A page goes before its entry, so that who reads the new entry reads the new page. No room is an answer, not an error.
bool PageShare::write_page(std::uint32_t slot, std::span<const std::byte> page) {
  const auto offset = static_cast<off_t>(layout_.page_offset(slot));
  return ::pwrite(fd_.get(), page.data(), page.size(), offset) == static_cast<ssize_t>(page.size());
}

bool PageShare::write_entry(std::uint32_t slot, const ShareEntry& entry) {
  const auto offset = static_cast<off_t>(layout_.entry_offset(slot));
  return ::pwrite(fd_.get(), &entry, sizeof entry, offset) == static_cast<ssize_t>(sizeof entry);
}

PageShare::Inserted PageShare::insert(const ContentDigest& digest, std::span<const std::byte> page,
                                      double score) {
  if (page.size() != page_size() || !std::isfinite(score) || hasher_(page) != digest) return Inserted::kWrong;
  const std::lock_guard lock(mutex_);
  if (const auto there = slots_.find(digest)) {
    // What was taken over and is not as it was is good again.
    if (unverified(*there)) write_page(*there, page);
    slots_.set_score(*there, score);
    write_entry(*there, {digest, score, 1});
    return Inserted::kThere;
  }
  const auto no_room = [this] {
    ++counts_.refused;
    return Inserted::kNoRoom;
  };
  while (bytes_with_one_more() > budget_) {
    if (slots_.size() == 0 || slots_[slots_.least()].score >= score) return no_room();
    drop(slots_.least());
    ++counts_.evicted;
  }
  const std::uint32_t slot = free_slot();
  if (slot >= share::ShareLayout::kMostSlots) return no_room();
  if (!write_page(slot, page) || !write_entry(slot, {digest, score, 1})) {
    punch(layout_.page_offset(slot), page_size());
    return no_room();
  }
  use(slot, digest, score);
  ++counts_.inserted;
  return Inserted::kInserted;
}

bool PageShare::unverified(std::uint32_t slot) const {
  return slot >= verified_to_ && slots_[slot].age < taken_over_;
}

bool PageShare::intact(std::uint32_t slot) {
  return share::read_at(fd_.get(), layout_.page_offset(slot), scratch_) &&
         equal_digests(hasher_(scratch_), slots_[slot].digest);
}

bool PageShare::holds(const ContentDigest& digest) {
  const std::lock_guard lock(mutex_);
  const auto slot = slots_.find(digest);
  if (!slot) return false;
  if (!unverified(*slot) || intact(*slot)) return true;
  drop(*slot);
  ++counts_.dropped;
  return false;
}

bool PageShare::set_score(const ContentDigest& digest, double score) {
  const std::lock_guard lock(mutex_);
  const auto slot = slots_.find(digest);
  if (!slot || !std::isfinite(score)) return false;
  if (slots_[*slot].score == score) return true;
  slots_.set_score(*slot, score);
  write_entry(*slot, {digest, score, 1});
  return true;
}

bool PageShare::remove(const ContentDigest& digest) {
  const std::lock_guard lock(mutex_);
  const auto slot = slots_.find(digest);
  if (slot) drop(*slot);
  return slot.has_value();
}

std::vector<ContentDigest> PageShare::digests() const {
  const std::lock_guard lock(mutex_);
  std::vector<ContentDigest> all;
  all.reserve(slots_.size());
  for (std::uint32_t slot = 0; slot < slots_.end(); ++slot) {
    if (slots_.in_use(slot)) all.push_back(slots_[slot].digest);
  }
  return all;
}

void PageShare::set_budget(std::uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  budget_ = bytes;
  shrink_to_budget();
}

bool PageShare::verify(std::size_t most) {
  const std::lock_guard lock(mutex_);
  std::size_t looked = 0;
  for (std::uint32_t steps = slots_.end(); steps > 0 && looked < most; --steps) {
    if (verify_next_ >= slots_.end()) verify_next_ = 0;
    const std::uint32_t slot = verify_next_++;
    if (slots_.in_use(slot)) {
      ++looked;
      if (!intact(slot)) {
        drop(slot);
        ++counts_.dropped;
      } else if (unverified(slot)) {
        --counts_.unverified;
      }
    }
    verified_to_ = std::max(verified_to_, slot + 1);
  }
  return counts_.unverified > 0;
}

PageShareStats PageShare::stats() const {
  const std::lock_guard lock(mutex_);
  PageShareStats stats = counts_;
  stats.pages = slots_.size();
  stats.bytes_used = bytes_used();
  stats.budget_bytes = budget_;
  stats.memory_bytes = slots_.memory_bytes() + group_used_.capacity() * sizeof group_used_[0];
  return stats;
}

}  // namespace memferry
