// A VMD server's memory and data path: images (the memory of guests on their way or parked) in one slab, written by
// sources, passed on to replicas, read by destinations. Index server and content server in one. Who may create, open
// or drop an image is decided in TypeScript over control connections; here a connection shows a token.
//
// Memory: everything that grows with what is held (pages, their index, execution states, popular pages and their counts)
// lies in the slab; so the cap holds by construction. The slab is `memory_bytes` less a reserve: min(8 MiB, a quarter)
// for the threads of connections, what they read into and one seat at the codecs (stage/codec_seats.h), 1.5 MiB for each
// further seat (a 32nd in all), and 14 bytes a slot for tables (its count, its domain, its place among the free ones, its
// place in the list of the image that it indexes). Packed payloads lie in slots of the slab while they come and go. Members
// share 4 to 8 sets of buffers (stage/member_desks.h), and have a connection in 32 KiB of the reserve at most.
//
// Bounds: kMostImages images and kMostMembers memberships, each of at most 64 regions, kMostSessions sessions and
// kMostConnectionsAnImage connections; kMostConnections in all.
//
// Threads: one a connection, each blocking in its socket, and one for each server that a connection passes replicas on
// to; calls from any thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "os/unique_fd.h"
#include "stage/held_state.h"
#include "wire/frame.h"

namespace memferry {

using ImageId = wire::MigrationId;
// Of a deduplication domain: the key of its content hash. Who has it may ask what the domain's images hold.
using DomainKey = std::array<std::uint8_t, 32>;

// A guest, to those who count how many have a page: 16 bytes that go with it wherever it runs.
using MemberGuest = std::array<std::uint8_t, 16>;

struct StageConfig {
  std::uint64_t memory_bytes = 0;
  std::uint64_t bandwidth = 0;      // bytes/s in each direction over all images; 0: no limit
  std::uint64_t popular_share = 8;  // of the slab, one in so many slots may hold popular pages; 0: none
  // A member that stands still for so long within a frame or an answer is cut, and one that takes three times as long.
  std::uint64_t member_timeout_ms = 10'000;
  // For a connection to another server that replicas go to, and for its answers: both well below what a source waits
  // for the first of the two servers.
  std::uint64_t chain_dial_timeout_ms = 1000;
  std::uint64_t chain_timeout_ms = 1500;
  std::uint64_t popular_period_ms = 600'000;  // what nobody has reported for so long fades in as long again
};

// Somebody of a domain who tells what a guest has, or wants to know what many guests have.
struct MemberConfig {
  ImageId id{};  // of this membership: what its connection says it is about
  DomainKey domain{};
  std::optional<MemberGuest> guest{};  // none: it may not report
};

struct ImageConfig {
  ImageId id{};
  std::vector<std::uint64_t> region_pages;  // capacities: what the index is made for
  std::uint8_t ordinal = 0;                 // of this server in the image's list
  std::optional<DomainKey> domain{};        // whose images may share content; none: it shares nothing
};

struct ImageStats {
  std::uint64_t pages_held = 0;    // with content, here
  std::uint64_t pages_shared = 0;  // of these: taken over by a reference instead of being sent
  std::uint64_t pages_zero = 0;    // known to be zeros
  std::uint64_t pages_known = 0;   // in the map, wherever they are
  std::uint64_t bytes = 0;         // of the slab: content, index and execution state
  std::uint64_t bytes_in = 0;      // on the wire, headers included
  std::uint64_t bytes_out = 0;
  bool sealed = false;
};

struct StageStats {
  std::uint64_t memory_bytes = 0;  // the cap
  std::uint64_t slab_bytes = 0;    // what of it can hold pages and index
  std::uint64_t free_bytes = 0;
  std::uint64_t images = 0;
  std::uint64_t connections = 0;
  std::uint64_t bytes_in = 0;
  std::uint64_t bytes_out = 0;
  std::uint64_t shared_pages = 0;  // over all images
  std::uint64_t hint_bytes = 0;    // of the slab: what is known of contents by their names
  std::uint64_t members = 0;
  std::uint64_t popular_names = 0;  // counted
  std::uint64_t popular_pages = 0;  // held; their room counts as free, since images get it
  std::uint64_t popular_table_bytes = 0;
};

class Stage {
 public:
  static constexpr std::uint64_t kLeastMemory = 16ULL << 20;
  static constexpr std::size_t kMostImages = 1024;
  static constexpr std::size_t kMostMembers = 1024;
  static constexpr std::size_t kMostSessions = 512;
  static constexpr std::size_t kMostAttempts = 64;  // in a table; later ones follow from it
  static constexpr std::size_t kMostConnectionsAnImage = 16;
  static constexpr std::size_t kMostConnections = 1024;

  // Throws std::invalid_argument (memory below kLeastMemory), SystemError (mmap).
  static std::shared_ptr<Stage> create(StageConfig config);
  ~Stage();  // close()

  // Takes all memory from the system before the first image is made, and keeps it: see Slab::preallocate().
  void preallocate();
  // At most so many bytes more are taken from the system from now on, beside what is given back to it: see
  // Slab::limit_cold().
  void limit_fresh(std::uint64_t bytes);

  // Each false or nullopt when there is no such image; create_image false when the index finds no room, throws
  // std::invalid_argument when the id is taken or a bound exceeded. The others throw it too for what cannot be meant
  // (a session that is there already, tokens that are no table, roles or ordinals out of range). After close() there
  // is no image, and none can be made (std::logic_error).
  bool create_image(const ImageConfig& config);
  // A membership has sessions as an image has, of the role kPopular; drop() ends it. False when there are too many
  // domains; throws as create_image().
  bool join(const MemberConfig& config);
  // Tokens of a session: [attempt * kStageRoles + role]; `roles` has a bit for each role that may connect.
  bool add_session(const ImageId& image, std::uint16_t session, unsigned roles,
                   std::vector<wire::Token> tokens);
  // Ends its connections too.
  bool remove_session(const ImageId& image, std::uint16_t session);
  // Where the server with this ordinal is, and this server's tokens for it, by attempt.
  bool set_chain(const ImageId& image, std::uint8_t ordinal, const std::string& host, std::uint16_t port,
                 std::vector<wire::Token> tokens);
  // Memory for an opaque state beside an image's pages; nullptr: there is no room for it.
  [[nodiscard]] std::shared_ptr<HeldState> make_state(std::uint64_t bytes);
  // Replaces the former one. state() is nullptr as well when there is none.
  bool put_state(const ImageId& image, std::shared_ptr<const HeldState> state);
  [[nodiscard]] std::shared_ptr<const HeldState> state(const ImageId& image) const;
  bool seal(const ImageId& image);
  // Ends its connections and gives its memory back to the system; when it returns, that has happened, but for a state that
  // somebody is still reading.
  bool drop(const ImageId& image);
  // The same in two steps: it is gone for everybody, and what is left to do takes as long as there is much of it. Empty
  // when it is not there. Any thread may call that, once, while this lives.
  [[nodiscard]] std::function<void()> take_out(const ImageId& image);

  [[nodiscard]] std::optional<ImageStats> image(const ImageId& image) const;
  // Whether every page of [0, pages of each region) is held by some server or zero, as the map has it.
  [[nodiscard]] std::optional<bool> whole(const ImageId& image,
                                          std::span<const std::uint64_t> region_pages) const;
  [[nodiscard]] StageStats stats() const;
  // Fresh with every stage, so that what is known of a former one's memory is known of nobody.
  [[nodiscard]] std::uint64_t identity() const;

  // For the listener: kAccepted takes the descriptor (and has answered it); otherwise the listener answers. A token is
  // good for one connection, and so are those of earlier attempts. Never blocks.
  [[nodiscard]] wire::HelloStatus attach(const wire::Hello& hello, UniqueFd& fd);
  void close();  // may be called twice

 private:
  Stage();
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace memferry
