// Pages of one deduplication domain that a host keeps ahead of guests that may come to it: a file of a bounded size,
// on tmpfs. One process writes it, within a budget; any number read (PageShareReader), with no lock between them,
// since a reader takes nothing for a page of the share that does not have the hash which it asked for.
//
// What is least worth keeping leaves first: by score, among equals what came first. Memory is given back at once. The
// file outlives its writer; the next one takes over what is there.
//
// Threads: any; a mutex serialises.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "os/unique_fd.h"
#include "page/content_hash.h"
#include "share/share_format.h"
#include "share/slot_table.h"

namespace memferry {

struct PageShareStats {
  std::uint64_t pages = 0;
  std::uint64_t bytes_used = 0;  // of the file: header, index and pages
  std::uint64_t budget_bytes = 0;
  std::uint64_t memory_bytes = 0;  // of this process, for the index
  std::uint64_t inserted = 0;
  std::uint64_t evicted = 0;     // for others, or for a smaller budget
  std::uint64_t refused = 0;     // of less worth than all that is there, or no room on the file system
  std::uint64_t unverified = 0;  // taken over, and not looked at yet
  std::uint64_t dropped = 0;     // taken over, and not what the index said
};

class PageShare {
 public:
  enum class Opened : std::uint8_t {
    kOpened,
    kBusy,     // somebody else writes it
    kForeign,  // a file of something else, or of somebody else: it is left alone
  };
  struct Result {
    Opened outcome = Opened::kOpened;
    std::unique_ptr<PageShare> share;  // where it was opened
  };
  // Makes the file (0600) where there is none. A share of another domain or page size is emptied. Throws SystemError.
  static Result open(const std::string& path, const ContentKey& key, std::uint64_t budget_bytes);
  ~PageShare();
  PageShare(const PageShare&) = delete;
  PageShare& operator=(const PageShare&) = delete;

  enum class Inserted : std::uint8_t {
    kInserted,
    kThere,   // has the score now
    kNoRoom,  // what is there has higher scores, or the file system is full
    kWrong,   // the bytes do not have this hash
  };
  // `page` is one page. Scores are finite.
  Inserted insert(const ContentDigest& digest, std::span<const std::byte> page, double score);
  // What was taken over is looked at first.
  [[nodiscard]] bool holds(const ContentDigest& digest);
  // False where it is not there.
  bool set_score(const ContentDigest& digest, double score);
  bool remove(const ContentDigest& digest);
  // Of everything that is there, in no order.
  [[nodiscard]] std::vector<ContentDigest> digests() const;
  // Gives back what is above it.
  void set_budget(std::uint64_t bytes);
  // Looks at the next so many pages, round and round, and drops what is not as the index says. True while some of those
  // that were taken over were not looked at.
  bool verify(std::size_t most);

  // The hash under the domain's key.
  [[nodiscard]] ContentDigest digest(std::span<const std::byte> page) const { return hasher_(page); }
  [[nodiscard]] std::uint64_t page_size() const { return layout_.page_size(); }
  [[nodiscard]] PageShareStats stats() const;

 private:
  PageShare(UniqueFd fd, const ContentKey& key, std::uint64_t page_size);
  void take_over();
  [[nodiscard]] bool take_over_group(std::uint64_t group, std::span<const share::ShareEntry> entries);
  [[nodiscard]] std::uint64_t bytes_used() const;
  [[nodiscard]] std::uint64_t bytes_with_one_more() const;
  [[nodiscard]] std::uint32_t free_slot();
  bool write_page(std::uint32_t slot, std::span<const std::byte> page);
  bool write_entry(std::uint32_t slot, const share::ShareEntry& entry);
  void use(std::uint32_t slot, const ContentDigest& digest, double score);
  void drop(std::uint32_t slot);
  void shrink_to_budget();
  [[nodiscard]] bool unverified(std::uint32_t slot) const;
  [[nodiscard]] bool intact(std::uint32_t slot);
  void punch(std::uint64_t offset, std::uint64_t bytes);

  const UniqueFd fd_;
  const ContentHasher hasher_;
  const share::ShareLayout layout_;
  mutable std::mutex mutex_;  // guards the rest
  std::uint64_t budget_ = 0;
  share::SlotTable slots_;
  std::vector<std::uint32_t> group_used_;  // slots in use, of each group up to the last one that has any
  std::set<std::uint32_t> partial_;        // groups with some slots in use and some free
  std::set<std::uint32_t> empty_;          // of those in group_used_
  std::uint32_t verify_next_ = 0;
  std::uint32_t verified_to_ = 0;   // what was taken over in slots below was looked at
  std::uint64_t taken_over_ = 0;    // slots of less age were
  std::vector<std::byte> scratch_;  // one page
  PageShareStats counts_;
};

// A destination's view. Whatever is wrong with the file, now or later, is a page that is not there.
//
// Threads: any.
class PageShareReader {
 public:
  // nullptr: no share of this domain and page size (there may be one later).
  static std::shared_ptr<PageShareReader> open(const std::string& path, const ContentKey& key,
                                               const std::atomic<bool>* stop = nullptr);

  // Whether the file at this path is the one that it reads.
  [[nodiscard]] bool is_at(const std::string& path) const;
  // Reads the index again. False when the file is no share any more; true, and part of it or none, once `stop`.
  bool refresh(const std::atomic<bool>* stop = nullptr);
  // The first eight bytes of the hashes that the index lists, best score first.
  [[nodiscard]] std::vector<std::uint64_t> names() const;
  [[nodiscard]] bool lists(std::uint64_t name) const;
  // The page with this hash; `into` is one page. False: not there, and `into` may be anything.
  bool read(const ContentDigest& digest, std::span<std::byte> into);

  [[nodiscard]] std::uint64_t page_size() const { return layout_.page_size(); }
  [[nodiscard]] std::uint64_t memory_bytes() const;

  // The name that a hash goes by.
  [[nodiscard]] static std::uint64_t name_of(const ContentDigest& digest);

 private:
  struct Listed {
    std::uint64_t name = 0;
    std::uint32_t slot = 0;
    float score = 0;
  };
  PageShareReader(UniqueFd fd, const ContentKey& key, std::uint64_t page_size);
  const UniqueFd fd_;
  const ContentHasher hasher_;
  const share::ShareLayout layout_;
  mutable std::mutex mutex_;  // guards listed_; held while a name is looked up, never while the file is read
  std::vector<Listed> listed_;  // by name
};

}  // namespace memferry
