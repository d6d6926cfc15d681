// Where the pages of one region are that their source has scattered: who holds each, and the hash of its content as
// it left the source, which whatever a server answers is compared with. Nothing is touched for pages that nobody
// has told of.
//
// Threads: any; each entry changes in two atomic words. Whoever must see both together serialises.
#pragma once

#include <atomic>
#include <cstdint>

#include "os/mapping.h"
#include "page/range.h"
#include "wire/frame.h"

namespace memferry {

class LocationMap {
 public:
  explicit LocationMap(std::uint64_t capacity_pages);

  void put(PageNumber page, wire::Holders holders, std::uint64_t hash);
  void clear(PageNumber page) { put(page, {}, 0); }
  [[nodiscard]] wire::Holders holders(PageNumber page) const;
  [[nodiscard]] std::uint64_t hash(PageNumber page) const;
  // That one does not hold it after all.
  void drop_holder(PageNumber page, std::uint8_t ordinal);

 private:
  // Memory that is zeros until it is written: holders are kept inverted, so that zero means nobody.
  Mapping holders_;
  Mapping hashes_;
  [[nodiscard]] std::uint16_t& holder_word(PageNumber page) const;
  [[nodiscard]] std::uint64_t& hash_word(PageNumber page) const;
};

}  // namespace memferry
