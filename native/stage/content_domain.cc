#include "stage/content_domain.h"

#include <sys/random.h>

#include <set>

#include "os/sys_error.h"
#include "page/hash.h"

namespace memferry {

ContentHints::ContentHints(std::shared_ptr<Slab> slab)
    : slab_(std::move(slab)),
      directory_(slab_, slab_->slots() / kShareOfSlab),
      contents_(slab_, slab_->slots() / kShareOfSlab) {}

std::shared_ptr<ContentDomain> ContentHints::domain(const DomainKey& key) {
  const std::lock_guard lock(mutex_);
  if (const auto found = domains_.find(key); found != domains_.end()) {
    if (auto domain = found->second.domain.lock()) return domain;
  }
  const std::uint16_t number = free_number_locked();
  // Its place first: a domain that ends in here would wait for this mutex.
  const auto [place, is_new] = domains_.try_emplace(key);
  try {
    auto domain = std::make_shared<ContentDomain>(shared_from_this(), key, number);
    place->second = {domain, number};
    return domain;
  } catch (...) {
    if (is_new) domains_.erase(place);
    throw;
  }
}

std::uint16_t ContentHints::free_number_locked() const {
  std::set<std::uint16_t> taken;
  for (const auto& [key, known] : domains_) taken.insert(known.number);
  std::uint16_t number = 1;
  while (taken.contains(number)) ++number;
  return number;
}

void ContentHints::gone(const DomainKey& key) {
  const std::lock_guard lock(mutex_);
  const auto found = domains_.find(key);
  // Made anew since by somebody else: then it is that one's.
  if (found != domains_.end() && found->second.domain.expired()) domains_.erase(found);
  if (!domains_.empty()) return;
  directory_.clear();
  contents_.clear();
}

std::uint64_t ContentHints::bytes() const {
  return (directory_.slots_used() + contents_.slots_used()) * slab_->slot_bytes();
}

ContentDomain::ContentDomain(std::shared_ptr<ContentHints> hints, const DomainKey& key, std::uint16_t number)
    : hints_(std::move(hints)), key_(key), number_(number), hasher_(key) {
  if (::getrandom(mask_.data(), sizeof mask_, 0) != sizeof mask_) throw_errno("getrandom");
}

ContentDomain::~ContentDomain() { hints_->gone(key_); }

std::uint32_t ContentDomain::new_asker() { return ++askers_; }

wire::KnownHolders ContentDomain::probe(const wire::ContentName& name, std::uint32_t asker,
                                        std::uint64_t now_ms) {
  using wire::KnownHolders;
  KnownHolders answer;
  hints_->directory_.change(masked(name), [&](std::optional<HintTable::Value> known) {
    if (known && known->first != KnownHolders::kOnItsWay) {
      answer = {known->first, known->second};
      return known;
    }
    // Who sends it, and since when.
    const std::uint64_t mine = std::uint64_t{asker} << 32 | (now_ms & 0xffffffff);
    if (known && known->second >> 32 != asker) {
      const std::uint32_t age =
          static_cast<std::uint32_t>(now_ms) - static_cast<std::uint32_t>(known->second);
      if (age < kPatienceMs) {
        answer.first = KnownHolders::kOnItsWay;
        return known;
      }
    }
    return std::optional<HintTable::Value>({KnownHolders::kOnItsWay, mine});
  });
  return answer;
}

void ContentDomain::held(const wire::ContentName& name, wire::KnownHolders holders, std::uint32_t asker) {
  using wire::KnownHolders;
  if (holders.first == KnownHolders::kOnItsWay) return;
  if (holders.first != KnownHolders::kNobody) {
    hints_->directory_.put(masked(name), {holders.first, holders.second});
    return;
  }
  hints_->directory_.change(masked(name), [&](std::optional<HintTable::Value> known) {
    const bool its = known && known->first == KnownHolders::kOnItsWay && known->second >> 32 == asker;
    return its ? std::nullopt : known;
  });
}

void ContentDomain::name(const wire::ContentName& name, Slab::Slot slot) {
  hints_->contents_.put(masked(name), {std::uint64_t{slot} + 1, 0});
}

bool ContentDomain::share(const wire::ContentHash& hash, Slab::Slot& slot, std::uint64_t& xxh3) {
  Slab& slab = *hints_->slab_;
  const wire::ContentName name = masked(name_of(hash));
  const auto known = hints_->contents_.find(name);
  if (!known) return false;
  slot = static_cast<Slab::Slot>(known->first - 1);
  if (slab.share(slot, number_)) {
    // Settled and counted: it stays what it is while it is hashed, and afterwards.
    const std::span<const std::byte> content(slab.data(slot), static_cast<std::size_t>(slab.slot_bytes()));
    if (equal_digests(hasher_(content), hash)) {
      xxh3 = xxh3_64(content);
      return true;
    }
    slab.release(std::span(&slot, 1));
  }
  // Free by now, something else, or never what it was said to be.
  hints_->contents_.erase(name);
  return false;
}

bool ContentDomain::is(const wire::ContentHash& hash, Slab::Slot slot) const {
  const Slab& slab = *hints_->slab_;
  return equal_digests(hasher_(std::span(slab.data(slot), static_cast<std::size_t>(slab.slot_bytes()))),
                       hash);
}

}  // namespace memferry
