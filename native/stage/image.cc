#include "stage/image.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <string>

namespace memferry {

// Zeros say that nothing is known, so that index memory needs no touching before it is used.
struct Image::Entry {
  static constexpr std::uint32_t kNoSlot = 0;
  static constexpr std::uint32_t kZeroSlot = 0xffffffff;

  std::uint64_t hash = 0;        // of the content, as the source has said; 0 where there is none
  std::uint32_t slot = kNoSlot;  // kZeroSlot, or one above the slot of the content
  std::uint8_t first = 0;        // the holders' complements
  std::uint8_t second = 0;
  std::uint8_t final = 0;   // 1: see apply_map()
  std::uint8_t shared = 0;  // 1: its content came by a reference

  static Entry of(wire::Holders holders) {
    Entry made;
    made.first = static_cast<std::uint8_t>(~holders.first);
    made.second = static_cast<std::uint8_t>(~holders.second);
    return made;
  }
  [[nodiscard]] wire::Holders holders() const {
    return {static_cast<std::uint8_t>(~first), static_cast<std::uint8_t>(~second)};
  }
  [[nodiscard]] bool zero() const { return slot == kZeroSlot; }
  [[nodiscard]] bool held() const { return slot != kNoSlot && slot != kZeroSlot; }
  [[nodiscard]] Slab::Slot content() const { return slot - 1; }
  [[nodiscard]] bool known() const { return zero() || first != 0; }
  [[nodiscard]] bool hashed() const { return !zero() && holders().first != wire::Holders::kDestination; }
  // Whether its record is for good, and of this content.
  [[nodiscard]] bool settled(std::uint64_t content_hash) const {
    return final != 0 && !zero() && (!hashed() || hash == content_hash);
  }
};

namespace {

constexpr std::uint64_t kEntryBytes = 16;
static_assert(Slab::kMostSlots < 0xffffffff);

std::uint64_t slots_for(std::uint64_t things, std::uint64_t things_a_slot) {
  return things / things_a_slot + (things % things_a_slot != 0 ? 1 : 0);
}

}  // namespace

void Image::Reading::clear() {
  slab_->release(slots_);
  slots_.clear();
  hashes_.clear();
  pieces_.clear();
}

std::shared_ptr<Image> Image::create(std::shared_ptr<Slab> slab, const ImageConfig& config,
                                     std::shared_ptr<ContentDomain> domain) {
  static_assert(sizeof(Entry) == kEntryBytes);
  if (config.region_pages.empty() || config.region_pages.size() > kMostRegions) {
    throw std::invalid_argument("an image of " + std::to_string(config.region_pages.size()) + " regions");
  }
  if (config.ordinal >= wire::Holders::kMostServers) {
    throw std::invalid_argument("a server with ordinal " + std::to_string(config.ordinal));
  }
  std::uint64_t left = slab->slots();
  for (const std::uint64_t pages : config.region_pages) {
    const std::uint64_t needed = slots_for(pages, slab->slot_bytes() / kEntryBytes);
    if (needed > left) throw std::invalid_argument("an image of more pages than this server can index");
    left -= needed;
  }
  auto image = std::shared_ptr<Image>(new Image(std::move(slab), config, std::move(domain)));
  for (std::size_t region = 0; region < image->region_pages_.size(); ++region) {
    const std::uint64_t needed = slots_for(image->region_pages_[region], image->entries_a_slot_);
    if (!image->slab_->take_all_zeroed(needed, image->index_[region])) return nullptr;
  }
  return image;
}

Image::Image(std::shared_ptr<Slab> slab, const ImageConfig& config, std::shared_ptr<ContentDomain> domain)
    : id_(config.id),
      ordinal_(config.ordinal),
      slab_(std::move(slab)),
      domain_(std::move(domain)),
      entries_a_slot_(slab_->slot_bytes() / kEntryBytes),
      region_pages_(config.region_pages),
      index_(config.region_pages.size()) {}

bool Image::inside(std::uint32_t region, std::uint64_t first_page, std::uint64_t page_count) const {
  return region < region_pages_.size() && wire::run_inside(first_page, page_count, region_pages_[region]);
}

Image::Entry& Image::entry(std::uint32_t region, std::uint64_t page) const {
  std::byte* block = slab_->data(index_[region][static_cast<std::size_t>(page / entries_a_slot_)]);
  return reinterpret_cast<Entry*>(block)[page % entries_a_slot_];
}

bool Image::set(Entry& entry, const Entry& to, Slab::Slot& freed) {
  held_ += static_cast<std::uint64_t>(to.held()) - static_cast<std::uint64_t>(entry.held());
  shared_ += std::uint64_t{to.shared} - std::uint64_t{entry.shared};
  zero_ += static_cast<std::uint64_t>(to.zero()) - static_cast<std::uint64_t>(entry.zero());
  known_ += static_cast<std::uint64_t>(to.known()) - static_cast<std::uint64_t>(entry.known());
  const bool frees = entry.held() && entry.slot != to.slot;
  if (frees) freed = entry.content();
  entry = to;
  return frees;
}

void Image::end_chain(Chain chain) {
  const std::lock_guard lock(mutex_);
  std::uint32_t& epoch = ended_chains_.try_emplace(chain.ordinal, chain.epoch).first->second;
  epoch = std::max(epoch, chain.epoch);
}

std::vector<Image::Chain> Image::ended_chains() const {
  const std::lock_guard lock(mutex_);
  std::vector<Chain> ended;
  for (const auto& [ordinal, epoch] : ended_chains_) ended.push_back({ordinal, epoch});
  return ended;
}

template <typename Change>
std::uint64_t Image::change(std::uint32_t region, PageRun run, bool all, const std::optional<Chain>& by,
                            const Change& to_of) {
  std::array<Slab::Slot, kEntriesAtOnce> freed;
  for (std::uint64_t at = 0; at < run.count;) {
    if (!all && given_up_.load(std::memory_order_relaxed)) return at;
    const std::uint64_t until = std::min(run.count, at + kEntriesAtOnce);
    std::size_t freed_count = 0;
    {
      const std::lock_guard lock(mutex_);
      if (index_.empty()) throw std::logic_error("an image that was dropped is written");
      if (by) {
        const auto ended = ended_chains_.find(by->ordinal);
        if (ended != ended_chains_.end() && by->epoch <= ended->second) return at;
      }
      for (; at < until; ++at) {
        Entry& changed = entry(region, run.first.value + at);
        if (set(changed, to_of(at, changed), freed[freed_count])) ++freed_count;
      }
    }
    slab_->release(std::span(freed).first(freed_count));
  }
  return run.count;
}

bool Image::store(std::uint32_t region, PageRun run, std::span<const Slab::Slot> slots,
                  std::span<const std::uint64_t> hashes, wire::Holders holders, bool shared,
                  const std::optional<Chain>& by) {
  std::vector<Slab::Slot> twice;
  const std::uint64_t stored = change(region, run, true, by, [&](std::uint64_t at, const Entry& before) {
    const std::uint64_t hash = hashes[static_cast<std::size_t>(at)];
    const bool settled = before.settled(hash);
    Entry to = Entry::of(settled ? before.holders() : holders);
    to.final = settled ? 1 : 0;
    to.shared = shared ? 1 : 0;
    to.slot = slots[static_cast<std::size_t>(at)] + 1;
    to.hash = hash;
    // A reference to what the page is already: one count is enough.
    if (before.slot == to.slot) twice.push_back(before.content());
    return to;
  });
  slab_->release(twice);
  slab_->release(slots.subspan(static_cast<std::size_t>(stored)));
  return stored == run.count;
}

bool Image::store_zeros(std::uint32_t region, PageRun run, wire::Holders holders,
                        const std::optional<Chain>& by) {
  const std::uint64_t stored = change(region, run, false, by, [&](std::uint64_t, const Entry& before) {
    if (before.final != 0 && before.zero()) return before;
    Entry to = Entry::of(holders);
    to.slot = Entry::kZeroSlot;
    return to;
  });
  return stored == run.count;
}

bool Image::forget(std::uint32_t region, PageRun run, const std::optional<Chain>& by,
                   std::span<const std::uint64_t> to_come) {
  const std::uint64_t forgotten = change(region, run, true, by, [&](std::uint64_t at, const Entry& before) {
    const bool same =
        !to_come.empty() && before.held() && before.hash == to_come[static_cast<std::size_t>(at)];
    return before.final != 0 || same ? before : Entry{};
  });
  return forgotten == run.count;
}

bool Image::apply_map(std::uint32_t region, PageRun run, wire::Holders holders, bool zero, bool final,
                      std::span<const std::uint64_t> hashes, const std::optional<Chain>& by) {
  const bool ours = holders.has(ordinal_);
  const std::uint64_t applied = change(region, run, false, by, [&](std::uint64_t at, const Entry& before) {
    Entry to = Entry::of(holders);
    to.final = final ? 1 : 0;
    if (zero) {
      to.slot = Entry::kZeroSlot;
    } else if (to.known() && to.hashed()) {
      to.hash = hashes[static_cast<std::size_t>(at)];
      // Other content than the one meant is out of date, whoever is said to hold it.
      if (ours && before.held() && before.hash == to.hash) {
        to.slot = before.slot;
        to.shared = before.shared;
      }
    }
    return to;
  });
  return applied == run.count;
}

void Image::read(std::uint32_t region, PageRun run, Reading& into) {
  into.clear();
  into.slots_.reserve(static_cast<std::size_t>(run.count));
  into.hashes_.reserve(static_cast<std::size_t>(run.count));
  into.pieces_.reserve(static_cast<std::size_t>(run.count));
  const std::lock_guard lock(mutex_);
  if (index_.empty()) throw std::logic_error("an image that was dropped is read");
  for (PageNumber page = run.first; page < run.end(); ++page.value) {
    const Entry& here = entry(region, page.value);
    using Kind = Reading::Kind;
    const Kind kind = here.held() ? Kind::kContent : here.zero() ? Kind::kZero : Kind::kAbsent;
    if (kind == Kind::kContent) {
      slab_->pin(here.content());
      into.slots_.push_back(here.content());
      into.hashes_.push_back(here.hash);
    }
    if (into.pieces_.empty() || into.pieces_.back().kind != kind) into.pieces_.push_back({kind, {page, 0}});
    ++into.pieces_.back().run.count;
  }
}

void Image::places(std::uint32_t region, PageRun run, std::vector<Place>& into) {
  into.clear();
  for (std::uint64_t at = 0; at < run.count;) {
    const std::uint64_t until = std::min(run.count, at + kEntriesAtOnce);
    const std::lock_guard lock(mutex_);
    if (index_.empty()) return;
    for (; at < until; ++at) {
      const Entry& here = entry(region, run.first.value + at);
      if (here.held()) into.push_back({at, here.content()});
    }
  }
}

bool Image::next_map_run(Cursor& cursor, std::uint64_t most_content, MapRun& into) {
  into.run = {};
  into.hashes.clear();
  while (cursor.region < region_pages_.size()) {
    const std::uint64_t pages = region_pages_[cursor.region];
    const std::lock_guard lock(mutex_);
    if (index_.empty()) return false;
    for (std::uint64_t left = kEntriesAtOnce; left > 0 && cursor.page < pages; --left, ++cursor.page) {
      const Entry& here = entry(cursor.region, cursor.page);
      if (into.run.count == 0) {
        if (!here.known()) continue;
        into.region = cursor.region;
        into.run.first = PageNumber{cursor.page};
        into.holders = here.holders();
        into.zero = here.zero();
        into.final = here.final != 0;
      } else if (!here.known() || here.holders() != into.holders || here.zero() != into.zero ||
                 (here.final != 0) != into.final || (here.hashed() && into.run.count == most_content)) {
        return true;
      }
      if (here.hashed()) into.hashes.push_back(here.hash);
      ++into.run.count;
    }
    if (cursor.page < pages) continue;
    ++cursor.region;
    cursor.page = 0;
    if (into.run.count > 0) return true;
  }
  return false;
}

bool Image::whole(std::span<const std::uint64_t> region_pages) {
  if (region_pages.size() > region_pages_.size()) return false;
  for (std::uint32_t region = 0; region < region_pages.size(); ++region) {
    if (region_pages[region] > region_pages_[region]) return false;
    for (std::uint64_t page = 0; page < region_pages[region];) {
      const std::lock_guard lock(mutex_);
      if (index_.empty()) return false;
      const std::uint64_t until = std::min(region_pages[region], page + kEntriesAtOnce);
      for (; page < until; ++page) {
        const Entry& here = entry(region, page);
        if (!here.known() || !(here.zero() || here.hashed())) return false;
      }
    }
  }
  return true;
}

bool Image::put_state(std::shared_ptr<const HeldState> state) {
  // The former one goes without the lock.
  const std::lock_guard lock(mutex_);
  if (index_.empty()) return false;
  state_.swap(state);
  return true;
}

std::shared_ptr<const HeldState> Image::state() const {
  const std::lock_guard lock(mutex_);
  return state_;
}

ImageStats Image::stats() const {
  ImageStats stats;
  stats.bytes_in = bytes_in.load(std::memory_order_relaxed);
  stats.bytes_out = bytes_out.load(std::memory_order_relaxed);
  stats.sealed = sealed_;
  const std::lock_guard lock(mutex_);
  stats.pages_held = held_;
  stats.pages_shared = shared_;
  stats.pages_zero = zero_;
  stats.pages_known = known_;
  std::uint64_t slots = held_ + (state_ ? state_->slots() : 0);
  for (const auto& index : index_) slots += index.size();
  stats.bytes = slots * slab_->slot_bytes();
  return stats;
}

void Image::drop() {
  std::vector<Slab::Slot> dropped;
  dropped.reserve(kEntriesAtOnce);
  for (std::uint32_t region = 0; region < region_pages_.size(); ++region) {
    for (std::uint64_t page = 0; page < region_pages_[region];) {
      dropped.clear();
      {
        const std::lock_guard lock(mutex_);
        // An image whose index found no room has nothing in it.
        if (index_.empty() || index_[region].empty()) break;
        const std::uint64_t until = std::min(region_pages_[region], page + kEntriesAtOnce);
        for (; page < until; ++page) {
          Entry& here = entry(region, page);
          Slab::Slot freed = 0;
          // Entries of zeros stay untouched.
          if (here.known() && set(here, Entry{}, freed)) dropped.push_back(freed);
        }
      }
      slab_->drop(dropped);
    }
  }
  std::vector<std::vector<Slab::Slot>> index;
  std::shared_ptr<const HeldState> state;
  {
    const std::lock_guard lock(mutex_);
    index.swap(index_);
    state.swap(state_);
  }
  for (const auto& slots : index) slab_->drop(slots);
  // What was freed by overwriting is warm still.
  slab_->give_back_free();
}

}  // namespace memferry
