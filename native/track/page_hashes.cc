#include "track/page_hashes.h"

#include <algorithm>
#include <vector>

#include "page/hash.h"

namespace memferry {

namespace {

// Between two looks at whether the region is being retired: about 100 us.
constexpr std::uint64_t kPagesAtOnce = 256;

std::uint64_t hash_of_zeros(std::uint64_t page_size) {
  const std::vector<std::byte> zeros(page_size);
  return xxh3_64(zeros);
}

std::uint64_t whole_pages(std::uint64_t bytes) {
  const std::uint64_t page_size = system_page_size();
  return std::max(page_size, (bytes + page_size - 1) / page_size * page_size);
}

}  // namespace

PageHashes::PageHashes(std::shared_ptr<Region> region)
    : region_(std::move(region)), zero_page_hash_(hash_of_zeros(region_->page_size())), remembered_(fresh()) {
  static_assert(sizeof(std::atomic<std::uint64_t>) == sizeof(std::uint64_t));
}

Mapping PageHashes::fresh() const {
  return Mapping::anonymous(whole_pages(region_->capacity_pages() * sizeof(std::uint64_t)));
}

void PageHashes::forget() { remembered_ = fresh(); }

std::atomic<std::uint64_t>& PageHashes::remembered(std::uint64_t page) const {
  return reinterpret_cast<std::atomic<std::uint64_t>*>(remembered_.data())[page];
}

void PageHashes::look(const RegionUse& use, const char* who, std::uint64_t pages, const AtomicBitmap* only,
                      const Visit& visit) {
  const std::uint64_t page_size = region_->page_size();
  std::uint64_t hashes[kPagesAtOnce];
  const auto wanted_of = [&](std::uint64_t from, std::uint64_t to, const auto& each) {
    while (from < to) {
      PageRun run{PageNumber{from}, to - from};
      if (only != nullptr) {
        const auto next = only->next_set(run.first, run.end(), run.count);
        if (!next) return;
        run = *next;
      }
      each(run);
      from = run.end().value;
    }
  };
  const auto hash = [&](PageRun run) {
    for (std::uint64_t from = run.first.value; from < run.end().value;) {
      if (use.revoked()) throw RegionGone(who);
      reader_.reset();
      const auto bytes =
          reader_.read(*region_, {PageNumber{from}, std::min(kPagesAtOnce, run.end().value - from)});
      const std::uint64_t count = bytes.size() / page_size;
      hash_pages(bytes, page_size, hashes);
      for (std::uint64_t i = 0; i < count; ++i) visit(from + i, hashes[i]);
      from += count;
    }
  };
  // A page of several of the system's may be empty in parts.
  if (page_size != system_page_size()) return wanted_of(0, pages, hash);
  // A page that is found empty is zeros at that moment, which lies within this call.
  const auto zeros = [&](PageRun run) {
    for (PageNumber page = run.first; page < run.end(); ++page.value) visit(page.value, zero_page_hash_);
  };
  std::uint64_t at = 0;
  contents_.visit(*region_, {PageNumber{0}, pages}, [&](PageRun run) {
    wanted_of(at, run.first.value, zeros);
    wanted_of(std::max(at, run.first.value), run.end().value, hash);
    at = run.end().value;
  });
  wanted_of(at, pages, zeros);
}

}  // namespace memferry
