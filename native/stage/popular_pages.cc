#include "stage/popular_pages.h"

#include <sys/random.h>

#include <algorithm>
#include <set>

#include "os/sys_error.h"

namespace memferry {

PopularPages::PopularPages(std::shared_ptr<Slab> slab, PopularityConfig config)
    : table_(std::move(slab), config), remembered_ms_(2 * config.period_ms) {}

std::shared_ptr<PopularDomain> PopularPages::domain(const DomainKey& key, std::uint64_t now_ms) {
  const std::lock_guard lock(mutex_);
  if (const auto found = domains_.find(key); found != domains_.end()) {
    found->second.asked_ms = now_ms;
    return found->second.domain;
  }
  make_room_locked(now_ms);
  if (domains_.size() >= kMostDomains) return nullptr;
  std::set<std::uint16_t> taken;
  for (const auto& [other, known] : domains_) taken.insert(known.domain->number());
  // One that is not quite forgotten comes to its turn again last.
  do ++number_;
  while (number_ == 0 || taken.contains(number_) || !table_.forgotten(number_));
  auto made = std::make_shared<PopularDomain>(table_.slab(), table_, key, number_);
  domains_.emplace(key, Known{made, now_ms});
  return made;
}

// Those that nobody is in leave once their counts have faded, and before that when others need the place.
void PopularPages::make_room_locked(std::uint64_t now_ms) {
  const auto empty = [](const Known& known) { return known.domain.use_count() == 1; };
  const auto leave = [&](auto at) {
    table_.forget(at->second.domain->number());
    return domains_.erase(at);
  };
  for (auto at = domains_.begin(); at != domains_.end();) {
    const bool faded = at->second.asked_ms + remembered_ms_ < now_ms;
    at = empty(at->second) && faded ? leave(at) : std::next(at);
  }
  while (domains_.size() >= kMostDomains) {
    auto oldest = domains_.end();
    for (auto at = domains_.begin(); at != domains_.end(); ++at) {
      if (!empty(at->second)) continue;
      if (oldest == domains_.end() || at->second.asked_ms < oldest->second.asked_ms) oldest = at;
    }
    if (oldest == domains_.end()) return;
    leave(oldest);
  }
}

PopularDomain::PopularDomain(std::shared_ptr<Slab> slab, Popularity& table, const DomainKey& key,
                             std::uint16_t number)
    : slab_(std::move(slab)), table_(table), number_(number), hasher_(key) {
  if (::getrandom(mask_.data(), sizeof mask_, 0) != sizeof mask_) throw_errno("getrandom");
}

// Where all seats are taken, by the one that entered longest ago: what it still counts for is then this guest's, and a
// count is at most too low.
unsigned PopularDomain::enter(const MemberGuest& guest, std::uint64_t now_ms) {
  const std::lock_guard lock(mutex_);
  auto seat =
      std::ranges::find_if(seats_, [&](const Seat& each) { return each.taken && each.guest == guest; });
  if (seat == seats_.end()) seat = std::ranges::find_if(seats_, [](const Seat& each) { return !each.taken; });
  if (seat == seats_.end()) seat = std::ranges::min_element(seats_, {}, &Seat::entered_ms);
  *seat = {guest, now_ms, true};
  return static_cast<unsigned>(seat - seats_.begin());
}

void PopularDomain::report(std::span<wire::ContentName> names, unsigned seat, std::uint64_t now_ms,
                           std::span<std::uint64_t> wanted) {
  for (wire::ContentName& name : names) name = masked(name);
  table_.report(number_, names, seat, now_ms, wanted);
}

bool PopularDomain::give(std::span<const std::byte> page, std::uint64_t now_ms) {
  return table_.give(number_, masked(content_name(hasher_(page))), page, now_ms);
}

void PopularDomain::list(std::uint64_t& cursor, std::uint32_t least_score, std::size_t most,
                         std::uint64_t now_ms, std::vector<wire::PopularName>& into) {
  const std::size_t before = into.size();
  table_.list(number_, cursor, least_score, most, now_ms, into);
  for (std::size_t i = before; i < into.size(); ++i) into[i].name = masked(into[i].name);
}

std::optional<Slab::Slot> PopularDomain::pin(const wire::ContentName& name, std::uint64_t now_ms) {
  return table_.pin(number_, masked(name), now_ms);
}

}  // namespace memferry
