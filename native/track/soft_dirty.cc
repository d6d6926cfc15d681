#include "track/soft_dirty.h"

#include <cerrno>
#include <stdexcept>

#include "os/mapping.h"
#include "page/racy_read.h"
#include "page/zero.h"
#include "track/memory_part.h"

namespace memferry {

SoftDirtyTracker::SoftDirtyTracker(std::shared_ptr<Region> region) : region_(std::move(region)) {}

// Every time: what has been mapped anew may be of another kind, and what is not mapped looks clean.
void SoftDirtyTracker::check_memory() const {
  if (const auto refused = refusal(*region_)) throw SystemError("soft-dirty: " + *refused, EOPNOTSUPP);
}

std::optional<std::string> SoftDirtyTracker::refusal(const Region& region) {
  if (region.page_size() != system_page_size()) return "the region's pages are not the system's";
  return refusal_of_soft_dirty(memory_parts(region));
}

bool SoftDirtyTracker::page_is_zero(const RegionUse& use, PageNumber page) {
  if (use.revoked()) throw RegionGone("soft-dirty");
  reader_.reset();
  return is_zero(RacyView(reader_.read(*region_, {page, 1})).bytes());
}

void SoftDirtyTracker::arm() {
  const RegionUse use(region_, "arm");
  disarm();
  check_memory();
  process_ = SoftDirtyProcess::of(region_->owner());
  auto watch = std::make_unique<SoftDirtyWatch>(region_->capacity_pages());
  process_->enter(*watch, region_->extents(), [&](PageNumber page) { return page_is_zero(use, page); });
  watch_ = std::move(watch);
  populated_ = std::make_unique<AtomicBitmap>(region_->capacity_pages());
  for (std::uint64_t word = 0; word < populated_->words(); ++word)
    populated_->or_word(word, watch_->content.word(word));
}

const AtomicBitmap* SoftDirtyTracker::populated_when_armed() const { return populated_.get(); }

std::uint64_t SoftDirtyTracker::collect(AtomicBitmap& dirty) {
  if (!watch_) throw std::logic_error("soft-dirty: collect() without arm()");
  const RegionUse use(region_, "collect");
  const std::uint64_t pages = region_->pages();
  if (dirty.capacity() < pages) throw std::invalid_argument("collect: the bitmap is smaller than the region");
  check_memory();
  populated_.reset();
  process_->look(*watch_, region_->extents(), [&](PageNumber page) { return page_is_zero(use, page); });
  std::uint64_t written = 0;
  const PageNumber end{watch_->written.capacity()};
  PageNumber from{0};
  while (const auto run = watch_->written.take_run(from, end, end.value)) {
    dirty.set_run(*run);
    written += run->count;
    from = run->end();
  }
  return written;
}

void SoftDirtyTracker::disarm() {
  if (watch_) process_->leave(*watch_);
  watch_.reset();
  populated_.reset();
  process_.reset();
}

}  // namespace memferry
