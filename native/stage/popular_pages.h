// Page distribution at a server: the domains whose members tell what their guests have, and who of them is which guest.
// A member is one session of one guest's reporter, or of a host that wants to have what is popular; it needs the
// domain's key, as whoever creates an image of the domain does, and learns nothing of other domains.
//
// A domain is remembered for as long as its counts may last, though nobody of it is here.
//
// Threads: any.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "page/content_hash.h"
#include "stage/popularity.h"
#include "stage/slab.h"
#include "stage/stage.h"

namespace memferry {

class PopularDomain;

class PopularPages {
 public:
  static constexpr std::size_t kMostDomains = 64;
  // Of the slab: counts, but never more than kMostTables slots, so that going through all of them takes some ms.
  static constexpr std::uint64_t kShareOfSlab = 64;
  static constexpr std::uint64_t kMostTables = 16384;

  PopularPages(std::shared_ptr<Slab> slab, PopularityConfig config);

  // nullptr: there are too many domains that somebody is in.
  std::shared_ptr<PopularDomain> domain(const DomainKey& key, std::uint64_t now_ms);
  [[nodiscard]] Popularity& table() { return table_; }
  [[nodiscard]] PopularityStats stats() const { return table_.stats(); }

 private:
  void make_room_locked(std::uint64_t now_ms);

  Popularity table_;
  const std::uint64_t remembered_ms_;
  std::mutex mutex_;          // guards the rest
  std::uint16_t number_ = 0;  // given last
  struct Known {
    std::shared_ptr<PopularDomain> domain;
    std::uint64_t asked_ms = 0;
  };
  std::map<DomainKey, Known> domains_;
};

class PopularDomain {
 public:
  PopularDomain(std::shared_ptr<Slab> slab, Popularity& table, const DomainKey& key, std::uint16_t number);
  PopularDomain(const PopularDomain&) = delete;
  PopularDomain& operator=(const PopularDomain&) = delete;

  // Which bit of a name's counts is the guest's. The same one when it comes again, after a cut or somewhere else.
  unsigned enter(const MemberGuest& guest, std::uint64_t now_ms);

  void report(std::span<wire::ContentName> names, unsigned seat, std::uint64_t now_ms,
              std::span<std::uint64_t> wanted);
  // By its own hash of it. False: nobody wanted it, or there is no room (any more).
  bool give(std::span<const std::byte> page, std::uint64_t now_ms);
  void list(std::uint64_t& cursor, std::uint32_t least_score, std::size_t most, std::uint64_t now_ms,
            std::vector<wire::PopularName>& into);
  std::optional<Slab::Slot> pin(const wire::ContentName& name, std::uint64_t now_ms);
  [[nodiscard]] std::uint16_t number() const { return number_; }

 private:
  [[nodiscard]] wire::ContentName masked(const wire::ContentName& name) const {
    return {name[0] ^ mask_[0], name[1] ^ mask_[1]};
  }
  struct Seat {
    MemberGuest guest{};
    std::uint64_t entered_ms = 0;
    bool taken = false;
  };

  const std::shared_ptr<Slab> slab_;
  Popularity& table_;
  const std::uint16_t number_;
  const ContentHasher hasher_;
  wire::ContentName mask_{};  // this server's alone, as a ContentDomain's
  std::mutex mutex_;          // guards seats_
  std::array<Seat, Popularity::kSeats> seats_{};
};

}  // namespace memferry
