#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "os/mapping.h"
#include "share/page_share.h"
#include "share/share_file.h"

namespace memferry {

using share::ShareEntry;

std::shared_ptr<PageShareReader> PageShareReader::open(const std::string& path, const ContentKey& key,
                                                       const std::atomic<bool>* stop) {
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd) return nullptr;
  std::shared_ptr<PageShareReader> reader(new PageShareReader(std::move(fd), key, system_page_size()));
  return reader->refresh(stop) ? reader : nullptr;
}

PageShareReader::PageShareReader(UniqueFd fd, const ContentKey& key, std::uint64_t page_size)
    : fd_(std::move(fd)), hasher_(key), layout_(page_size) {}

std::uint64_t PageShareReader::name_of(const ContentDigest& digest) {
  std::uint64_t name = 0;
  std::memcpy(&name, digest.data(), sizeof name);
  return name;
}

bool PageShareReader::is_at(const std::string& path) const {
  struct stat there {};
  struct stat here {};
  return ::stat(path.c_str(), &there) == 0 && ::fstat(fd_.get(), &here) == 0 && there.st_dev == here.st_dev &&
         there.st_ino == here.st_ino;
}

bool PageShareReader::refresh(const std::atomic<bool>* stop) {
  std::vector<Listed> listed;
  const auto bytes = share::length_of(fd_.get());
  const bool ours = bytes && share::header_of(fd_.get(), hasher_, layout_.page_size()) == share::Found::kOurs;
  if (ours) {
    std::vector<ShareEntry> entries;
    const std::uint64_t groups = layout_.groups_in(*bytes);
    for (std::uint64_t group = 0; group < groups && !(stop != nullptr && *stop); ++group) {
      const auto read = share::read_index(fd_.get(), layout_, group, entries);
      for (std::size_t i = 0; i < read.size(); ++i) {
        if (read[i].used != 1) continue;
        const auto slot = static_cast<std::uint32_t>(group * layout_.group_slots() + i);
        const float score = std::isfinite(read[i].score) ? static_cast<float>(read[i].score) : 0.0F;
        listed.push_back({name_of(read[i].digest), slot, score});
      }
    }
    std::sort(listed.begin(), listed.end(), [](const Listed& a, const Listed& b) { return a.name < b.name; });
  }
  const std::lock_guard lock(mutex_);
  listed_.swap(listed);
  return ours;
}

std::vector<std::uint64_t> PageShareReader::names() const {
  std::vector<Listed> best;
  {
    const std::lock_guard lock(mutex_);
    best = listed_;
  }
  std::stable_sort(best.begin(), best.end(),
                   [](const Listed& a, const Listed& b) { return a.score > b.score; });
  std::vector<std::uint64_t> names;
  names.reserve(best.size());
  for (const Listed& each : best) names.push_back(each.name);
  return names;
}

bool PageShareReader::lists(std::uint64_t name) const {
  const std::lock_guard lock(mutex_);
  const auto at =
      std::lower_bound(listed_.begin(), listed_.end(), name,
                       [](const Listed& each, std::uint64_t wanted) { return each.name < wanted; });
  return at != listed_.end() && at->name == name;
}

bool PageShareReader::read(const ContentDigest& digest, std::span<std::byte> into) {
  const std::uint64_t name = name_of(digest);
  // Several pages under one name are a forgery, or very rare.
  constexpr std::size_t kMostCandidates = 4;
  std::array<std::uint32_t, kMostCandidates> slots{};
  std::size_t count = 0;
  {
    const std::lock_guard lock(mutex_);
    auto at = std::lower_bound(listed_.begin(), listed_.end(), name,
                               [](const Listed& each, std::uint64_t wanted) { return each.name < wanted; });
    for (; at != listed_.end() && at->name == name && count < kMostCandidates; ++at)
      slots[count++] = at->slot;
  }
  for (std::size_t i = 0; i < count; ++i) {
    if (share::read_at(fd_.get(), layout_.page_offset(slots[i]), into.first(layout_.page_size())) &&
        equal_digests(hasher_(into.first(layout_.page_size())), digest)) {
      return true;
    }
  }
  return false;
}

std::uint64_t PageShareReader::memory_bytes() const {
  const std::lock_guard lock(mutex_);
  return listed_.capacity() * sizeof(Listed);
}

}  // namespace memferry
