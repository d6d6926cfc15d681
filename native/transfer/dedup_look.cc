// Which pages are looked at, and what is seen.
#include <time.h>

#include <algorithm>
#include <bit>

#include "page/hash.h"
#include "page/zero.h"
#include "transfer/scatter_dedup.h"

namespace memferry {
namespace {

// Read inside the gate of the regions' memory in one go.
constexpr std::uint64_t kPassPages = 16;
// How far ahead of the lanes it begins: what they take until an answer is here.
constexpr std::chrono::milliseconds kAhead{5};
constexpr std::uint64_t kLeastAhead = 64;
constexpr std::size_t kTwinWays = 8;

std::uint64_t thread_cpu_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000U + static_cast<std::uint64_t>(now.tv_nsec);
}

wire::ContentName name_of(const ContentDigest& hash) { return ContentDomain::name_of(hash); }

// Of the 64 pages of a word those from this one on.
std::uint64_t bits_from(std::uint64_t page, std::uint64_t word) {
  if (page <= word * 64) return ~0ULL;
  return page < word * 64 + 64 ? ~0ULL << page % 64 : 0;
}

constexpr unsigned kRegionShift = 48;
std::uint64_t twin_entry(std::uint32_t region, PageNumber page) {
  return (std::uint64_t{region} << kRegionShift | page.value) + 1;
}

}  // namespace

// Looked at, found nowhere, and not sent yet.
std::uint64_t Scatter::Dedup::unsent_pages() const {
  std::uint64_t pages = 0;
  for (std::uint32_t region = 0; region < regions_.size(); ++region) {
    const AtomicBitmap& to_tell = regions_[region]->to_tell;
    const AtomicBitmap& pending = scatter_.shared_.queue.pending(region);
    for (std::uint64_t i = 0; i < to_tell.words(); ++i)
      pages += static_cast<std::uint64_t>(std::popcount(to_tell.word(i) & pending.word(i)));
  }
  return pages;
}

// The next page to look at, all around from where the last one was, but for those that the lanes are about to take.
bool Scatter::Dedup::next_page() {
  const SendQueue& queue = scatter_.shared_.queue;
  const auto regions = static_cast<std::uint32_t>(regions_.size());
  const auto [cursor_region, cursor_page] = queue.server_cursor();
  const std::uint64_t ahead =
      std::max(kLeastAhead, measured_.link_bytes_per_second
                                ? static_cast<std::uint64_t>(*measured_.link_bytes_per_second *
                                                             std::chrono::duration<double>(kAhead).count() /
                                                             static_cast<double>(scatter_.page_size_))
                                : kLeastAhead);
  // The rest of this region, the others, and what of this one lies before.
  for (std::uint32_t turn = 0; turn <= regions; ++turn) {
    const AtomicBitmap& examined = regions_[at_region_]->examined;
    const std::uint64_t words = (queue.known_pages(at_region_) + 63) / 64;
    for (std::uint64_t i = at_page_.value / 64; i < words; ++i) {
      std::uint64_t bits = queue.content_word(at_region_, i) & ~examined.word(i);
      bits &= bits_from(at_page_.value, i);
      if (at_region_ == cursor_region)
        bits &= ~(bits_from(cursor_page.value, i) & ~bits_from(cursor_page.value + ahead, i));
      if (bits == 0) continue;
      at_page_ = PageNumber{i * 64 + static_cast<std::uint64_t>(std::countr_zero(bits))};
      return at_page_.value < queue.known_pages(at_region_);
    }
    at_region_ = (at_region_ + 1) % regions;
    at_page_ = PageNumber{0};
  }
  return false;
}

// False: zeros. Memory that its owner gives back meanwhile was sent meanwhile: then nobody asks for what was seen.
bool Scatter::Dedup::look_at(Page& page, std::span<const std::byte> bytes) {
  // A guest may be writing it: everything that is said of the page is of the same bytes.
  racy_copy(copy_.data(), bytes.data(), copy_.size());
  if (is_zero(copy_)) return false;
  page.hash = hasher_(copy_);
  page.xxh3 = xxh3_64(copy_);
  return true;
}

// Into batch_: pages with content, each looked at for the first and last time in this round.
void Scatter::Dedup::pick(std::uint64_t most) {
  batch_.clear();
  const auto began = Clock::now();
  const std::uint64_t cpu = thread_cpu_ns();
  std::uint64_t looked = 0;
  bool more = true;
  while (more && looked < most) {
    const TouchGate::Pass pass(scatter_.shared_.gate);
    if (!pass) return;
    for (std::uint64_t i = 0; i < kPassPages && looked < most; ++i) {
      more = next_page();
      if (!more) break;
      ++looked;
      const PageRun run{at_page_, 1};
      regions_[at_region_]->examined.set(at_page_);
      reader_.reset();
      const auto bytes = reader_.read(*scatter_.shared_.queue.region(at_region_), run);
      ++at_page_.value;
      Deferred picked;
      picked.page.region = at_region_;
      picked.page.page = run.first;
      if (look_at(picked.page, bytes)) batch_.push_back(picked);
    }
  }
  hash_ns_ += thread_cpu_ns() - cpu;
  examined_ += batch_.size();
  if (batch_.size() < kDedupSamplePages) return;
  const double rate = static_cast<double>(batch_.size() * scatter_.page_size_) /
                      std::chrono::duration<double>(Clock::now() - began).count();
  measured_.hash_bytes_per_second =
      measured_.hash_bytes_per_second > 0 ? (measured_.hash_bytes_per_second + rate) / 2 : rate;
}

std::optional<Scatter::Dedup::Place> Scatter::Dedup::twin_of(const Page& page) {
  const std::span table(reinterpret_cast<std::uint64_t*>(twins_.data()), twin_mask_ + 1);
  const wire::ContentName name = name_of(page.hash);
  std::uint64_t* free = nullptr;
  for (std::size_t i = 0; i < kTwinWays; ++i) {
    std::uint64_t& entry = table[(name[1] + i) & twin_mask_];
    if (entry == 0) {
      if (free == nullptr) free = &entry;
      break;
    }
    const auto region = static_cast<std::uint32_t>((entry - 1) >> kRegionShift);
    const PageNumber other{(entry - 1) & ((1ULL << kRegionShift) - 1)};
    const bool named = regions_[region]->named.test(other);
    if (named && regions_[region]->names[other.value] == name) {
      // Looked at once more itself, and found as it was.
      if (Place(region, other) == Place(page.region, page.page)) return std::nullopt;
      return Place(region, other);
    }
    if (!named && free == nullptr) free = &entry;  // written since
  }
  if (free == nullptr) free = &table[name[1] & twin_mask_];
  *free = twin_entry(page.region, page.page);
  return std::nullopt;
}

void Scatter::Dedup::replace_twin(const Page& with, const Place& before) {
  const std::span table(reinterpret_cast<std::uint64_t*>(twins_.data()), twin_mask_ + 1);
  for (std::size_t i = 0; i < kTwinWays; ++i) {
    std::uint64_t& entry = table[(name_of(with.hash)[1] + i) & twin_mask_];
    if (entry == twin_entry(before.first, before.second)) entry = twin_entry(with.region, with.page);
  }
}

}  // namespace memferry
