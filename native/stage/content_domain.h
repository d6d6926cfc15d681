// Deduplication at a server. A *domain* is a set of images whose guests may share content: its key makes the names
// and hashes of contents, so that whoever lacks it can neither ask for one nor refer to one. A server is two things
// for a domain: a directory, which says which server holds a content (who knows), and a holder, which gives an image a
// count of a slot that has the content already (who holds). What the directory says and by what name a slot is found
// are hints, by anybody of the domain; what is shared was hashed here, in full, when it was asked for. So a lie costs
// a transfer, never a page.
//
// Threads: any.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "page/content_hash.h"
#include "stage/hint_table.h"
#include "stage/slab.h"
#include "stage/stage.h"
#include "wire/frame.h"

namespace memferry {

class ContentDomain;

// Of one server, over all domains. Two tables, each at most a 64th of the slab; none while there is no domain.
class ContentHints : public std::enable_shared_from_this<ContentHints> {
 public:
  static constexpr std::uint64_t kShareOfSlab = 64;
  explicit ContentHints(std::shared_ptr<Slab> slab);

  // The same one as long as anybody has it.
  std::shared_ptr<ContentDomain> domain(const DomainKey& key);
  [[nodiscard]] std::uint64_t bytes() const;

 private:
  friend class ContentDomain;
  std::uint16_t free_number_locked() const;
  void gone(const DomainKey& key);

  const std::shared_ptr<Slab> slab_;
  HintTable directory_;
  HintTable contents_;
  std::mutex mutex_;  // guards domains_
  struct Known {
    std::weak_ptr<ContentDomain> domain;
    std::uint16_t number = 0;
  };
  std::map<DomainKey, Known> domains_;  // no more than there are images
};

class ContentDomain {
 public:
  // Somebody who said that it sends a content, and has not said that it is there after so long, is not waited for.
  static constexpr std::uint64_t kPatienceMs = 2000;

  ContentDomain(std::shared_ptr<ContentHints> hints, const DomainKey& key, std::uint16_t number);
  ~ContentDomain();
  ContentDomain(const ContentDomain&) = delete;
  ContentDomain& operator=(const ContentDomain&) = delete;

  // What its slots are marked with: no other domain that lives here has it.
  [[nodiscard]] std::uint16_t number() const { return number_; }
  // A number for one that asks: an image's source.
  std::uint32_t new_asker();
  // Who holds it; nobody: the asker is the one to send it, and others are told so.
  wire::KnownHolders probe(const wire::ContentName& name, std::uint32_t asker, std::uint64_t now_ms);
  // kNobody: the asker does not send it (here) after all.
  void held(const wire::ContentName& name, wire::KnownHolders holders, std::uint32_t asker);

  // Its content goes by this name, somebody says.
  void name(const wire::ContentName& name, Slab::Slot slot);
  // A slot that has this content, with a count of its own for the caller, and the content's XXH3. False: there is
  // none that is known.
  bool share(const wire::ContentHash& hash, Slab::Slot& slot, std::uint64_t& xxh3);

  // Whether that is the content of a slot which the caller has a count of.
  [[nodiscard]] bool is(const wire::ContentHash& hash, Slab::Slot slot) const;

  [[nodiscard]] static wire::ContentName name_of(const wire::ContentHash& hash) { return content_name(hash); }

 private:
  // Random, and this server's alone: entries of one domain are nobody else's, even where a name is overheard.
  [[nodiscard]] wire::ContentName masked(const wire::ContentName& name) const {
    return {name[0] ^ mask_[0], name[1] ^ mask_[1]};
  }

  const std::shared_ptr<ContentHints> hints_;
  const DomainKey key_;
  const std::uint16_t number_;
  const ContentHasher hasher_;
  wire::ContentName mask_{};
  std::atomic<std::uint32_t> askers_{0};
};

}  // namespace memferry
